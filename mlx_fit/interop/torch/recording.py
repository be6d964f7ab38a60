"""What goes into and comes out of every layer of a model during one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit._tree import leaves
from mlx_fit.interop.torch.tensors import is_tensor, to_array


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        name: the layer's name in its model.
        layer: the layer.
        input, output: its first array each, as NumPy; None where there is none.
    """

    name: str
    layer: Any
    input: np.ndarray | None
    output: np.ndarray | None


def first_array(value: Any) -> Any:
    """The first array or tensor of a nested value; of an object with fields, of its fields."""
    if hasattr(value, "to_tuple"):  # what models of transformers return
        value = value.to_tuple()
    for _, leaf in leaves(value):
        if isinstance(leaf, mx.array) or is_tensor(leaf):
            return leaf
    return None


def as_numpy(value: Any) -> np.ndarray | None:
    """The first array of ``value`` as NumPy, floats as float32."""
    array = first_array(value)
    if array is None:
        return None
    array = to_array(array)
    if mx.issubdtype(array.dtype, mx.floating):
        array = array.astype(mx.float32)
    return np.array(array)


def record_torch(model: Any, call: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """The result of ``call()`` and the calls of the layers of ``model``, innermost first."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[..., None]:
        def note(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = as_numpy([*args, *kwargs.values()])
            calls.append(Call(name, layer, given, as_numpy(output)))

        return note

    handles = [
        layer.register_forward_hook(hook(name), with_kwargs=True)
        for name, layer in model.named_modules(remove_duplicate=False)
    ]
    try:
        return call(), calls
    finally:
        for handle in handles:
            handle.remove()


def record_mlx(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """The same for an MLX model, which has no hooks: the classes stand aside for the call."""
    calls: list[Call] = []
    with _watched(model, calls):
        return call(), calls


@contextmanager
def _watched(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    layers: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in sorted(model.named_modules(), key=lambda item: item[0]):
        layers.setdefault(id(layer), (name, layer))
    classes = [(layer, type(layer)) for _, layer in layers.values()]
    try:
        for name, layer in layers.values():
            layer.__class__ = _noting(type(layer), name, calls)
        yield
    finally:
        for layer, kind in classes:
            layer.__class__ = kind


def _noting(kind: Any, name: str, calls: list[Call]) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = as_numpy([*args, *kwargs.values()])
        output = kind.__call__(self, *args, **kwargs)
        calls.append(Call(name, self, given, as_numpy(output)))
        return output

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
