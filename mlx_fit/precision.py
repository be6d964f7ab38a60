"""Mixed precision: half-precision forward pass, float32 weights, and the dynamic loss scale.

The scheme is that of Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740): float32
weights and optimizer state, the forward and backward pass in half precision, and for float16 a
scaled loss, so that small gradients do not vanish.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_fit._tree import RandomState, assign, leaves, named_arrays, restore, snapshot
from mlx_fit.errors import ConfigurationError

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Precision:
    """A precision policy.

    Attributes:
        name: what the user wrote.
        compute_dtype: dtype of the forward pass; None leaves weights and inputs as they are.
        weights_dtype: dtype the trainable weights are kept in; None leaves them as they are.
        scales_loss: whether the loss is scaled dynamically.
    """

    name: str
    compute_dtype: mx.Dtype | None = None
    weights_dtype: mx.Dtype | None = None
    scales_loss: bool = False

    @classmethod
    def get(cls, name: str) -> Precision:
        """The policy of a name."""
        if name not in POLICIES:
            raise ConfigurationError(
                f"precision={name!r} is unknown; expected one of {', '.join(map(repr, POLICIES))}."
            )
        return POLICIES[name]

    def prepare(self, model: nn.Module) -> None:
        """Convert the model's weights once, to the dtype that the policy keeps them in."""
        if self.weights_dtype is None:
            return
        if self.name == "bfloat16":
            warnings.warn(
                "precision='bfloat16' keeps weights in bfloat16, whose 8 bits lose updates smaller "
                "than 1/256 of a weight. Use 'mixed_bfloat16' unless memory forbids it.",
                stacklevel=4,
            )
            named = weights_of(model)
        else:
            trainable = named_arrays(model.trainable_parameters())
            named = [(name, value) for name, value in trainable if value.dtype in FLOATS]
        wrong = [
            (k, v.astype(self.weights_dtype)) for k, v in named if v.dtype != self.weights_dtype
        ]
        if wrong:
            assign(model, wrong)

    def cast(self, tree: Any) -> Any:
        """Floating-point arrays of a tree in the dtype of the forward pass."""
        dtype = self.compute_dtype
        if dtype is None:
            return tree
        return tree_map(lambda a: a.astype(dtype) if _is_float(a) else a, tree)

    @contextmanager
    def casting(self, model: nn.Module) -> Iterator[None]:
        """Weights, and the inputs of ``model(...)``, in the dtype of the forward pass inside.

        Outside the weights are the originals again. Buffers (running statistics) are never cast,
        and keep what the forward pass made of them. Targets and sample weights are not touched: an
        objective sees its batch as it is, and only what it calls the model with is cast.
        """
        if self.compute_dtype is None:
            yield
            return
        originals = weights_of(model)
        cast = [(name, value.astype(self.compute_dtype)) for name, value in originals]
        assign(model, cast)
        kind = type(model)
        model.__class__ = self._casting_class(kind)
        try:
            yield
        finally:
            model.__class__ = kind
            now = dict(named_arrays(model.parameters()))
            # What the forward pass replaced is a buffer of the user's own, and stays.
            kept = [now.get(name) is value for name, value in cast]
            assign(model, [o for o, is_kept in zip(originals, kept, strict=True) if is_kept])

    def look_for_promotion(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        """Warn of layers that leave half precision in a forward pass that leaves no trace."""
        saved, key = snapshot(model.state), RandomState()

        def run_forward() -> None:
            with self.casting(model):
                forward()

        try:
            warn_of_promotion(model, run_forward)
        finally:
            restore(model.state, saved)
            key.restore()

    def _casting_class(self, kind: type) -> type:
        """A subclass that casts what it is called with: Python looks calls up in the class."""

        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            return kind.__call__(model, *self.cast(args), **self.cast(kwargs))

        return type(kind.__name__, (kind,), {"__call__": call})


POLICIES = {
    policy.name: policy
    for policy in (
        Precision("float32"),
        Precision("mixed_bfloat16", mx.bfloat16, mx.float32),
        Precision("mixed_float16", mx.float16, mx.float32, scales_loss=True),
        Precision("bfloat16", mx.bfloat16, mx.bfloat16),
    )
}


def weights_of(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Floating-point weights by name, trainable and frozen, without running statistics."""
    return [
        (name, value)
        for name, value in named_arrays(model.parameters())
        if value.dtype in FLOATS and not name.rsplit(".", 1)[-1].startswith("running_")
    ]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and leaf.dtype in FLOATS


# --- the dynamic loss scale ----------------------------------------------------------------------

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # good updates until the scale doubles, PyTorch's GradScaler's number


def initial_scale() -> dict[str, mx.array]:
    """The state of the loss scale: the scale, and how many good updates it has lasted."""
    return {"scale": mx.array(INITIAL_SCALE), "good_updates": mx.array(0.0)}


def next_scale(state: dict[str, mx.array], overflowed: mx.array) -> dict[str, mx.array]:
    """Halve after an overflow, double after :data:`GROWTH_INTERVAL` good updates in a row."""
    good = mx.where(overflowed, 0.0, state["good_updates"] + 1)
    grows = good >= GROWTH_INTERVAL
    factor = mx.where(overflowed, 0.5, mx.where(grows, 2.0, 1.0))
    return {"scale": state["scale"] * factor, "good_updates": mx.where(grows, 0.0, good)}


# --- layers that promote back --------------------------------------------------------------------


def warn_of_promotion(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Name, in one warning, the layers that turn half-precision inputs into float32 outputs.

    Args:
        model: the model.
        forward: runs it lazily, in half precision; its result is thrown away.
    """
    names = {id(module): name or "(the model itself)" for name, module in model.named_modules()}
    found: list[str] = []
    classes = [(module, type(module)) for module in model.modules()]
    watching = {kind: _watching(kind, names, found) for _, kind in classes}
    for module, kind in classes:
        module.__class__ = watching[kind]
    try:
        forward()
    finally:
        for module, kind in classes:
            module.__class__ = kind
    culprits = sorted({n for n in found if not any(o.startswith(f"{n}.") for o in found)})
    if culprits := [n for n in culprits if n != "(the model itself)" or len(culprits) == 1]:
        warnings.warn(
            f"These layers turn half-precision inputs into float32, and what follows runs in it: "
            f"{', '.join(culprits)}. Cast their constants and outputs to the dtype of their input.",
            stacklevel=2,
        )


def _watching(kind: type, names: dict[int, str], found: list[str]) -> type:
    """A subclass of a layer's class that notes when it promotes: Python looks calls up there."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = kind.__call__(self, *args, **kwargs)
        halves = (mx.float16, mx.bfloat16)
        inputs = [a for _, a in leaves([args, kwargs]) if isinstance(a, mx.array)]
        if any(a.dtype in halves for a in inputs) and any(
            isinstance(a, mx.array) and a.dtype == mx.float32 for _, a in leaves(outputs)
        ):
            found.append(names[id(self)])
        return outputs

    return type(kind.__name__, (kind,), {"__call__": call})
