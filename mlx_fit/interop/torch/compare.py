"""Run a PyTorch model and its MLX port side by side, and say where they part."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_fit._tree import named_arrays, restore, snapshot
from mlx_fit.checks import boolean, number
from mlx_fit.errors import ConfigurationError
from mlx_fit.interop.torch.comparison import Comparison, Row
from mlx_fit.interop.torch.differences import Tolerance, difference
from mlx_fit.interop.torch.reasons import (
    input_reasons,
    layer_reasons,
    optimizer_reasons,
    value_reasons,
)
from mlx_fit.interop.torch.recording import (
    Call,
    as_numpy,
    first_array,
    record_mlx,
    record_torch,
)
from mlx_fit.interop.torch.slots import Slot
from mlx_fit.interop.torch.sources import Rename, read_state, renamed
from mlx_fit.interop.torch.structure import Structure
from mlx_fit.interop.torch.tensors import is_tensor, require_torch, to_array
from mlx_fit.modes import evaluation_mode

_PROJECTION = re.compile(r"(^|\.)(query|key|value|out)_proj$")


def compare(
    torch_model: Any,
    mlx_model: nn.Module,
    inputs: Any,
    *,
    mlx_inputs: Any = None,
    rename: Rename = None,
    training: bool = False,
    gradients: bool = True,
    optimizers: tuple[Any, Any] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> Comparison:
    """Run both models on the same inputs and compare them layer by layer.

    Layers are paired by their names, as :func:`load_weights` pairs weights. Outputs are compared in
    whichever layout fits, so channels may come first or last. Gradients are those of the sum of the
    outputs times fixed random numbers. Both models are left as they were.

    Args:
        torch_model: a ``torch.nn.Module`` on the CPU.
        mlx_model: its port, with the same weights (:func:`load_weights`).
        inputs: what the PyTorch model is called with: one array or tensor, a tuple or list of
            arguments, or a dict of keyword arguments.
        mlx_inputs: what the MLX model is called with; None takes ``inputs``, in channels last where
            the first convolution of the PyTorch model reads them in channels first.
        rename: as for :func:`load_weights`.
        training: compare in training mode, but for dropout, and the running statistics after it.
        gradients: whether gradients are compared too.
        optimizers: ``(torch optimizer, MLX optimizer)`` whose settings are compared as well.
        rtol, atol: largest difference that is no difference: ``atol + rtol * largest value``.

    Returns:
        The tables, the first layer that differs, and why it may.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> import mlx.nn as nn, numpy as np
        >>> from mlx_fit.interop.torch import compare, load_weights
        >>> def check(torch_model):
        ...     model = nn.Sequential(nn.Linear(3, 4), nn.GELU())
        ...     load_weights(model, torch_model)
        ...     return compare(torch_model, model, np.ones((2, 3), np.float32)).agrees
    """
    torch = require_torch("compare")
    _check(torch, torch_model, mlx_model, optimizers)
    tolerance = Tolerance(number("rtol", rtol, 0), number("atol", atol, 0))
    boolean("training", training)
    boolean("gradients", gradients)
    state = read_state(torch_model)
    names = renamed(state, rename)
    pair = _Pair(
        torch_model,
        mlx_model,
        Structure(mlx_model, names),
        names,
        _layer_names(torch_model, rename),
        tolerance,
    )
    with _undone(torch, torch_model, mlx_model, training):
        weights, unpaired = pair.weights()
        their_args, our_args = _arguments(torch, torch_model, inputs, mlx_inputs)
        theirs, their_calls = record_torch(torch_model, lambda: _call(torch_model, their_args))
        _, our_calls = record_mlx(mlx_model, lambda: _call(mlx_model, our_args))
        rows, missing = pair.layers(their_calls, our_calls, set(weights))
        buffers = pair.buffers() if training else []
        if any(call.output is not None and not call.output.size for call in our_calls[-1:]):
            raise ConfigurationError("inputs hold no rows: empty outputs agree whatever they are.")
        notes: list[str] = []
        if optimizers is not None:
            notes += [f"optimizer: {reason}" for reason in optimizer_reasons(*optimizers)]
        if any(call.output is not None and not _is_finite(call.output) for call in our_calls):
            notes.append("outputs hold NaN or infinity, which agree wherever both models have them")
        compared: list[Row] = []
        if gradients:
            compared, note = pair.gradients(theirs, our_args, our_calls[-1])
            notes += note
    return Comparison(rows, compared, buffers, weights, [*missing, *unpaired], notes)


def _check(torch: Any, torch_model: Any, mlx_model: Any, optimizers: Any) -> None:
    if not isinstance(torch_model, torch.nn.Module):
        kind = type(torch_model).__name__
        raise ConfigurationError(f"torch_model is a {kind}; expected a torch.nn.Module, first.")
    if not isinstance(mlx_model, nn.Module):
        kind = type(mlx_model).__name__
        raise ConfigurationError(f"mlx_model is a {kind}; expected an mlx.nn.Module, second.")
    if optimizers is not None and not (
        isinstance(optimizers, (tuple, list))
        and len(optimizers) == 2
        and isinstance(optimizers[0], torch.optim.Optimizer)
        and isinstance(optimizers[1], optim.Optimizer)
    ):
        raise ConfigurationError("optimizers: expected (a torch optimizer, an MLX optimizer).")


class _Pair:
    """Both models, and which parts of them belong together."""

    def __init__(
        self,
        torch_model: Any,
        model: nn.Module,
        structure: Structure,
        names: Mapping[str, str],
        layer_names: Mapping[str, str],
        tolerance: Tolerance,
    ) -> None:
        self._torch_model = torch_model
        self._model = model
        self._structure = structure
        self._names = names
        self._layer_names = layer_names
        self._tolerance = tolerance

    def weights(self) -> tuple[list[str], list[str]]:
        """Names of arrays that differ, and of those without tensor or of another shape."""
        state = read_state(self._torch_model)
        own = dict(named_arrays(self._model.parameters()))
        differing: list[str] = []
        unpaired: list[str] = []
        for slot in self._structure.slots:
            tensors = self._tensors(slot, state)
            if tensors is None:
                unpaired += slot.names
                continue
            for name, array in zip(slot.names, slot.read(tensors), strict=True):
                if not mx.allclose(array, own[name], rtol=1e-5, atol=1e-7).item():
                    differing.append(name)
        return differing, unpaired

    def _tensors(self, slot: Slot, state: Mapping[str, Any]) -> list[Any] | None:
        tensors = [state.get(self._names.get(source, "")) for source in slot.sources]
        fits = all(
            tensor is not None and tuple(tensor.shape) == shape
            for tensor, shape in zip(tensors, slot.source_shapes, strict=True)
        )
        return tensors if fits else None

    # --- outputs ---------------------------------------------------------------------------------

    def layers(
        self, their_calls: list[Call], our_calls: list[Call], differing: set[str]
    ) -> tuple[list[Row], list[str]]:
        """A row for each call of a layer that both made, and the layers that PyTorch lacks."""
        by_name: dict[str, list[Call]] = defaultdict(list)
        for call in their_calls:
            by_name[self._layer_names.get(call.name, call.name)].append(call)
        numbers: dict[str, int] = defaultdict(int)
        rows: list[Row] = []
        missing: list[str] = []
        for ours in our_calls:
            name = self._structure.layers[ours.name]
            number = numbers[ours.name]
            numbers[ours.name] += 1
            twins = by_name.get(name, [])
            if number >= len(twins):
                # The projections of attention are no layers of their own in PyTorch.
                if ours.name not in missing and not _PROJECTION.search(ours.name):
                    missing.append(ours.name)
            elif ours.output is not None and twins[number].output is not None:
                rows.append(self._row(twins[number], ours, rows, differing))
        return rows, missing

    def _row(self, theirs: Call, ours: Call, before: list[Row], differing: set[str]) -> Row:
        assert theirs.output is not None
        assert ours.output is not None
        apart = difference(theirs.output, ours.output)
        agrees = self._tolerance.accepts(apart.largest, apart.scale)
        reasons: list[str] = []
        if not agrees:
            reasons = self._own_weights(ours, differing)
            reasons += self._input_reasons(theirs, ours, before) or layer_reasons(
                theirs, ours, apart, self._tolerance
            )
        return Row(
            ours.name,
            theirs.name,
            type(ours.layer).__name__,
            apart.largest,
            apart.scale,
            agrees,
            tuple(reasons),
        )

    def _own_weights(self, ours: Call, differing: set[str]) -> list[str]:
        prefix = f"{ours.name}." if ours.name else ""
        own = [name for name in sorted(differing) if name.startswith(prefix)]
        return [f"weights: {', '.join(own[:4])} differ: call load_weights first"] if own else []

    def _input_reasons(self, theirs: Call, ours: Call, before: list[Row]) -> list[str]:
        if theirs.input is None or ours.input is None:
            return []
        apart = difference(theirs.input, ours.input)
        if self._tolerance.accepts(apart.largest, apart.scale):
            inside = [
                row for row in before if row.name.startswith(f"{ours.name}." * bool(ours.name))
            ]
            if inside and all(row.agrees for row in inside) and len(inside) > 1:
                return [
                    "the layers inside of it agree: look at what its own code computes around them "
                    "(residuals, activations, GELU variant, pooling, masks, reductions)"
                ]
            return []
        broken = [row.name for row in before if not row.agrees]
        if broken:
            return [f"its input differs, as the output of {broken[0]!r} does"]
        return input_reasons(theirs.input, ours.input, self._tolerance)

    # --- running statistics and gradients --------------------------------------------------------

    def buffers(self) -> list[Row]:
        """Running statistics after a call in training mode."""
        state = read_state(self._torch_model)
        own = dict(named_arrays(self._model.parameters()))
        rows: list[Row] = []
        for slot in self._structure.slots:
            tensors = self._tensors(slot, state)
            if tensors is not None and slot.names[0].endswith(("running_mean", "running_var")):
                rows += self._array_rows(slot, slot.read(tensors), own)
        return rows

    def gradients(self, output: Any, arguments: Any, our_call: Call) -> tuple[list[Row], list[str]]:
        """Gradients of the outputs times fixed random numbers."""
        output = first_array(output)
        if output is None or our_call.output is None or not output.requires_grad:
            return [], ["gradients were not compared: the output has none"]
        if not named_arrays(self._model.trainable_parameters()):
            return [], ["gradients were not compared: every parameter of the MLX model is frozen"]
        expected = as_numpy(output)
        assert expected is not None
        apart = difference(expected, our_call.output)
        if apart.moved is None:
            return [], ["gradients were not compared: the shapes of the outputs differ"]
        factors = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)
        torch = require_torch("compare")
        (output * torch.from_numpy(factors).to(output.dtype)).sum().backward()
        theirs = {
            name: to_array(tensor.grad)
            for name, tensor in self._torch_model.named_parameters(remove_duplicate=False)
            if tensor.grad is not None
        }
        ours = self._own_gradients(arguments, mx.array(factors.transpose(apart.moved)))
        rows: list[Row] = []
        for slot in self._structure.slots:
            tensors = self._tensors(slot, theirs)
            if tensors is not None and slot.names[0] in ours:
                rows += self._array_rows(slot, slot.gradient(tensors), ours)
        return rows, []

    def _own_gradients(self, arguments: Any, factors: mx.array) -> dict[str, mx.array]:
        own = named_arrays(self._model.trainable_parameters())
        groups: dict[int, list[str]] = defaultdict(list)
        for name, array in own:
            groups[id(array)].append(name)

        def loss(arguments: Any) -> mx.array:
            return (first_array(_call(self._model, arguments)) * factors).sum()

        _, tree = nn.value_and_grad(self._model, loss)(arguments)
        gradients = dict(named_arrays(tree))
        # An array in two places has one gradient in PyTorch: the sum.
        return {
            name: sum((gradients[n] for n in group[1:]), gradients[group[0]])
            for group in groups.values()
            for name in group
            if all(n in gradients for n in group)
        }

    def _array_rows(
        self, slot: Slot, expected: list[mx.array], own: Mapping[str, mx.array]
    ) -> Iterator[Row]:
        for name, array in zip(slot.names, expected, strict=True):
            if name not in own:
                continue
            theirs, ours = as_numpy(array), as_numpy(own[name])
            assert theirs is not None
            assert ours is not None
            apart = difference(theirs, ours)
            agrees = self._tolerance.accepts(apart.largest, apart.scale)
            reasons = [] if agrees else value_reasons(apart, ours, self._tolerance)
            if not agrees and "running" in name:
                reasons.append("momentum: both libraries mean the share of the new batch")
            yield Row(
                name,
                " + ".join(self._names[source] for source in slot.sources),
                "array",
                apart.largest,
                apart.scale,
                agrees,
                tuple(reasons),
            )


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _call(model: Any, arguments: Any) -> Any:
    return model(**arguments) if isinstance(arguments, dict) else model(*arguments)


def _layer_names(torch_model: Any, rename: Rename) -> dict[str, str]:
    """The names of torch's layers as the MLX model would have them."""
    layers = [name for name, _ in torch_model.named_modules()]
    if rename is None:
        return {name: name for name in layers}
    if isinstance(rename, Mapping):
        known = {
            key: new
            for key, new in rename.items()
            if not key or any(n == key or n.startswith(f"{key}.") for n in layers)
        }
        return {old: new for new, old in renamed([n for n in layers if n], known).items()} | {
            "": ""
        }
    found = {"": ""}
    for name in layers[1:]:
        new = rename(f"{name}.weight")  # the function knows names of tensors
        if new is not None:
            found[name] = new.removesuffix(".weight")
    return found


@contextmanager
def _undone(torch: Any, torch_model: Any, model: nn.Module, training: bool) -> Iterator[None]:
    """Both models in the mode to compare in; afterwards everything is as it was."""
    with ExitStack() as stack:
        stack.enter_context(_torch_undone(torch, torch_model))
        stack.enter_context(evaluation_mode(model))
        state = snapshot(model.state)
        stack.callback(lambda: restore(model.state, state))
        torch_model.train(training)
        model.train(training)
        for layer in [*torch_model.modules(), *model.modules()]:
            if "Dropout" in type(layer).__name__:
                layer.eval()
        yield


@contextmanager
def _torch_undone(torch: Any, model: Any) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


# --- inputs ---------------------------------------------------------------------------------------


def _arguments(torch: Any, torch_model: Any, inputs: Any, mlx_inputs: Any) -> tuple[Any, Any]:
    theirs = tree_map(lambda leaf: _as_tensor(torch, leaf), _as_arguments(inputs))
    if mlx_inputs is not None:
        return theirs, tree_map(_as_array, _as_arguments(mlx_inputs))
    dimensions = _first_convolution(torch, torch_model)

    def convert(leaf: Any) -> Any:
        array = _as_array(leaf)
        if isinstance(array, mx.array) and dimensions is not None:
            num_spatial, channels = dimensions
            if array.ndim == num_spatial + 2 and array.shape[1] == channels:
                return mx.moveaxis(array, 1, -1)
        return array

    return theirs, tree_map(convert, _as_arguments(inputs))


def _as_arguments(inputs: Any) -> Any:
    if isinstance(inputs, (dict, tuple)):
        return inputs
    return tuple(inputs) if isinstance(inputs, list) else (inputs,)


def _as_tensor(torch: Any, leaf: Any) -> Any:
    if isinstance(leaf, mx.array):
        leaf = np.array(leaf.astype(mx.float32) if leaf.dtype == mx.bfloat16 else leaf)
    if isinstance(leaf, np.ndarray):
        leaf = torch.from_numpy(np.array(leaf))  # a copy: the model may work in place
        return leaf.float() if leaf.dtype == torch.float64 else leaf
    return leaf.detach().clone() if is_tensor(leaf) else leaf


def _as_array(leaf: Any) -> Any:
    return to_array(leaf) if is_tensor(leaf) or isinstance(leaf, np.ndarray) else leaf


def _first_convolution(torch: Any, model: Any) -> tuple[int, int] | None:
    """Spatial dimensions and channels of the first convolution or, failing that, image norm."""
    for layer in model.modules():
        kind = type(layer).__name__
        if kind.startswith(("Conv", "BatchNorm", "InstanceNorm")) and kind[-2:] in (
            "1d",
            "2d",
            "3d",
        ):
            channels = getattr(layer, "in_channels", getattr(layer, "num_features", None))
            if channels is not None:
                return int(kind[-2]), channels
    return None
