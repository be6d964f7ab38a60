"""Adapters into weights and out of them, off a model and on it again."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import named_arrays
from mlx_fit.checks import boolean, number
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import (
    LEAVES,
    AdapterLayer,
    adapters_of,
    dense_shape,
    dense_weight,
    require_adapters,
)
from mlx_fit.finetune.blocks import is_quantized, listed, ordered_modules, replace
from mlx_fit.finetune.select import freeze
from mlx_fit.modes import evaluation_mode

TOLERANCE = 1e-3  # of the largest output
ROUNDINGS = 4  # of the dtype: measured on tiny Llamas at up to 0.8 (bfloat16) and 2.1 (float16)
KEPT = 0.1  # of what adapters do may be lost: measured 0.01 to 0.08 in 8 bits, 0.14 to 0.8 in 4
TINY = 1e-6  # of the largest output: float32's own rounding
HELD = 0.5  # of what adapters add to weights must stay: measured 1 or nearly, or below 0.3
MERGED = 1.25  # times the rounding of unpacked layers is no loss to packing


def merge(model: nn.Module) -> list[str]:
    """Put each adapter's product into its layer's weight, in place; the layers are plain then.

    A quantized layer gives a dequantized one: the product would be lost in the few bits of its
    weight. :func:`unmerge` brings the adapters back exactly; until then the model keeps their
    arrays and those of the base. :func:`fuse` lets go of them.

    Returns:
        The dotted names of the merged layers.

    Raises:
        ConfigurationError: the model has no adapters.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_fit.finetune import apply_lora
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> _ = apply_lora(model, targets="layers.1")
        >>> merge(model)
        ['layers.1']
        >>> type(model.layers[1]).__name__
        'Linear'
    """
    layers = require_adapters(model)
    dtype = _float_dtype(model)
    plain = {id(layer): layer.merged(dtype) for layer in layers.values()}
    mx.eval([layer.parameters() for layer in plain.values()])
    for name, layer in layers.items():
        # Past Module.__setattr__: the adapter is no child of the merged layer.
        object.__setattr__(plain[id(layer)], "_unmerged", _Kept(layer))
        replace(model, name, plain[id(layer)])
    return [*layers]


def unmerge(model: nn.Module) -> list[str]:
    """Bring back the adapters that :func:`merge` merged, exactly as they were.

    Returns:
        The dotted names of their layers.

    Raises:
        ConfigurationError: nothing is merged, it was merged by :func:`fuse`, or other adapters were
            put on since.
    """
    if present := adapters_of(model):
        raise ConfigurationError(
            f"The model has adapters, on {listed(present)}; detach() them before unmerging others."
        )
    kept = {
        name: vars(module)["_unmerged"].layer
        for name, module in ordered_modules(model)
        if "_unmerged" in vars(module)
    }
    if not kept:
        raise ConfigurationError(
            "The model has no merged adapters. unmerge() undoes merge(); fuse() cannot be undone."
        )
    for name, layer in kept.items():
        replace(model, name, layer)
    return [*kept]


def fuse(
    model: nn.Module,
    inputs: Any,
    *,
    quantize: bool = False,
    tolerance: float | None = None,
) -> list[str]:
    """Merge adapters for good, after checking that the outputs stay the same.

    Args:
        model: a model with adapters.
        inputs: what to try it on: ``model(inputs)``, as tokens of shape (1, length).
        quantize: packs layers with a quantized base again, as they were. Rounding to a few bits
            usually loses the adapter; then this is refused.
        tolerance: largest difference of an output, relative to the largest output. None looks at
            root mean squares of the differences instead. Without ``quantize`` they stay below 1e-3
            of the largest output, or four roundings of the coarsest dtype that the model computes
            in: 0.4 % in float16, 3 % in bfloat16. With it, below a tenth of what the adapters
            change, or what unpacked layers cost by rounding (8 bits usually keep that, 4 do not).
            In both cases unpacked weights must hold at least half of what the adapters add, where
            small additions may round to nothing in half precision.

    Returns:
        The dotted names of the fused layers.

    Raises:
        ConfigurationError: the outputs would differ; the adapters are then still there.
    """
    boolean("quantize", quantize)
    limit = None if tolerance is None else number("tolerance", tolerance, 0.0)
    layers = require_adapters(model)
    with evaluation_mode(model):
        before = _outputs(model, inputs)
        with disabled(model):
            base = _outputs(model, inputs)
        names = merge(model)
        merged = after = _outputs(model, inputs)
        vanished = _vanished(model, layers)
        if quantize:
            for name in names:
                replace(model, name, _requantized(dict(ordered_modules(model))[name], layers[name]))
            after = _outputs(model, inputs)
    if limit is not None:
        refusal = _too_far(before, after, limit)
    elif vanished is not None:
        refusal = vanished
    elif quantize:
        refusal = _lost(before, after, base, merged)
    else:
        refusal = _too_far_on_average(before, after, max(TOLERANCE, ROUNDINGS * _rounding(model)))
    if refusal is not None:
        for name, layer in layers.items():
            replace(model, name, layer)
        remedy = "Look at the adapters' values, or allow more with tolerance= (--tolerance)"
        if limit is None and vanished is not None:
            remedy = "Keep the adapters beside the model, or say tolerance= (--tolerance)"
        elif quantize:
            remedy = (
                "Fuse with quantize=False, which gives dequantized layers (without --requantize)"
            )
        raise ConfigurationError(f"{refusal}; the adapters are left as they were. {remedy}.")
    modules = dict(ordered_modules(model))
    for name in names:
        vars(modules[name]).pop("_unmerged", None)
    return names


class Adapters:
    """Adapters taken off a model by :func:`detach`, to be put on again by :func:`attach`.

    Attributes:
        layers: dotted name -> adapter layer.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer]) -> None:
        self.layers = dict(layers)

    def __repr__(self) -> str:
        return f"Adapters({listed(self.layers)})"


def detach(model: nn.Module) -> Adapters:
    """Take the adapters off; the model is its frozen base again.

    Several adapters share one base so: keep each under a name, and :func:`attach` the one to use.

    Raises:
        ConfigurationError: the model has no adapters, or other parameters train as well and would
            stay as they are now.
    """
    layers = require_adapters(model)
    trainable = [name for name, _ in named_arrays(model.trainable_parameters())]
    if others := [name for name in trainable if name.rpartition(".")[2] not in LEAVES]:
        raise ConfigurationError(
            f"{listed(others)} train as well as the adapters, so that what is left is not the "
            "base. model.freeze() first if they shall stay as they are now."
        )
    for name, layer in layers.items():
        replace(model, name, layer.base)
    return Adapters(layers)


def attach(model: nn.Module, adapters: Adapters) -> None:
    """Put adapters on that :func:`detach` took off, of this model or of one like it.

    A model with another base gets layers of its own, which begin with the same values.

    Raises:
        ConfigurationError: the model has adapters, or layers they do not fit.
    """
    if present := adapters_of(model):
        raise ConfigurationError(f"The model has adapters, on {listed(present)}; detach() them.")
    modules = dict(ordered_modules(model))
    for name, layer in adapters.layers.items():
        fits = name in modules and type(modules[name]) is type(layer.base)
        if not fits or dense_shape(modules[name]) != dense_shape(layer.base):
            raise ConfigurationError(
                f"These adapters are for another model: {type(model).__name__} has no layer {name} "
                f"of type {type(layer.base).__name__} and shape {dense_shape(layer.base)}."
            )
    freeze(model)
    made: dict[int, AdapterLayer] = {}  # a layer that two places share keeps one adapter
    for name, layer in adapters.layers.items():
        base = modules[name]
        if id(base) not in made:
            made[id(base)] = layer if layer.base is base else _moved(layer, base)
            made[id(base)].unfreeze(recurse=False)
            made[id(base)].train(base.training)
        replace(model, name, made[id(base)])


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside: the adapters stay where they are and do nothing."""
    layers = [*require_adapters(model).values()]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _moved(layer: AdapterLayer, base: nn.Module) -> AdapterLayer:
    """The adapter beside another base; the one it was made for keeps its own."""
    moved = copy.copy(layer)
    moved._no_grad = set(layer._no_grad)
    moved[moved.base_key] = base
    moved.dropout = nn.Dropout(layer.settings.dropout)
    for leaf in LEAVES:
        if leaf in layer:
            moved[leaf] = mx.array(layer[leaf])  # += changes an array in place
    return moved


class _Kept:
    """Hides an adapter layer from its merged twin's parameters."""

    def __init__(self, layer: AdapterLayer) -> None:
        self.layer = layer


def _float_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype that most of a model's own floating-point arrays have."""
    own = [name.rpartition(".")[2] not in LEAVES for name, _ in named_arrays(model.parameters())]
    arrays = [array for _, array in named_arrays(model.parameters())]
    counts = Counter(
        array.dtype
        for array, is_own in zip(arrays, own, strict=True)
        if is_own and mx.issubdtype(array.dtype, mx.floating)
    )
    return counts.most_common(1)[0][0] if counts else mx.float32


def _rounding(model: nn.Module) -> float:
    """The relative rounding of the coarsest dtype that a model's own layers compute in."""
    named = named_arrays(model.parameters())
    dtypes = {array.dtype for name, array in named if name.rpartition(".")[2] not in LEAVES}
    if any(is_quantized(m) and m.mode != "affine" for m in model.modules()):
        dtypes.add(mx.bfloat16)  # what MLX unpacks the mx formats to
    return max((mx.finfo(d).eps for d in dtypes if mx.issubdtype(d, mx.floating)), default=0.0)


def _requantized(plain: nn.Module, layer: AdapterLayer) -> nn.Module:
    base: Any = layer.base
    if not is_quantized(base):
        return plain
    packed = plain.to_quantized(group_size=base.group_size, bits=base.bits, mode=base.mode)
    packed.train(base.training)
    return packed


def _outputs(model: nn.Module, inputs: Any) -> mx.array:
    found = _first(model(inputs))
    mx.eval(found)
    return found


def _too_far(before: mx.array, after: mx.array, limit: float) -> str | None:
    """What is wrong with outputs of which one differs by more than ``limit``, if any does."""
    moved = float(mx.abs(before - after).max()) / _size(before)
    if moved <= limit:
        return None
    return f"Fusing would move an output by {moved:.3g} of the largest, above tolerance={limit:g}"


def _too_far_on_average(before: mx.array, after: mx.array, limit: float) -> str | None:
    """The same of the root mean square."""
    moved = _rms(before - after) / _size(before)
    if moved <= limit:
        return None
    return f"Fusing would move the outputs by {moved:.3g} of the largest, above {limit:.2g}"


def _lost(before: mx.array, after: mx.array, base: mx.array, merged: mx.array) -> str | None:
    """Why packed layers do not do what the adapters did, if so; all from the same inputs.

    Args:
        before: outputs with adapters. after: with packed layers. base: without adapters.
        merged: with unpacked layers, which differ by their rounding alone.
    """
    effect, moved, rounding = (_rms(before - other) for other in (base, after, merged))
    if moved <= max(KEPT * effect, MERGED * rounding, TINY * _size(before)):
        return None
    return (
        f"Fusing would move the outputs by {moved / _size(before):.3g} of the largest, where the "
        f"adapters move them by {effect / _size(before):.3g}: these would be lost in the few bits "
        "of packed layers, or much of them"
    )


def _vanished(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> str | None:
    """Why merged weights are little else than the base's, if so.

    Outputs do not tell: they are rounded themselves, by more than a small adapter moves them. The
    share that is held is the projection of what the weights changed by on what was to be added.
    """
    modules = dict(ordered_modules(model))
    held = wanted = size = 0.0
    for name, layer in layers.items():
        base = dense_weight(layer.base).astype(mx.float32)
        added = layer.adapted_weight() - base
        changed = modules[name].weight.astype(mx.float32) - base
        held += float(mx.sum(added * changed))
        wanted += float(mx.sum(added * added))
        size += float(mx.sum(base * base))
    if wanted <= TINY**2 * size or not held < HELD * wanted:  # outputs tell of NaN
        return None
    dtype = str(modules[next(iter(layers))].weight.dtype).rpartition(".")[2]
    return (
        f"Of what the adapters add to the weights {held / wanted:.0%} would be left: the rest is "
        f"smaller than the rounding of {dtype}"
    )


def _rms(array: mx.array) -> float:
    return float(mx.sqrt(mx.square(array).mean()))


def _size(outputs: mx.array) -> float:
    return max(1.0, float(mx.abs(outputs).max()))


def _first(outputs: Any) -> mx.array:
    """The array to compare: the outputs, the first of several, or the logits."""
    if isinstance(outputs, dict):
        outputs = outputs.get("logits", next(iter(outputs.values())))
    if isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    return outputs.astype(mx.float32)
