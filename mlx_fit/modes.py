"""The modes and settings of a model's layers, which a compiled step bakes in."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

PLAIN = (bool, int, float, str, type(None))


def fingerprint(
    model: nn.Module, apart: Mapping[int, Collection[str]] = MappingProxyType({})
) -> list[Any]:
    """What a compiled step bakes in: each module, its mode, what it froze, its plain settings.

    Args:
        model: the model.
        apart: names of settings that nothing is computed from, by the ``id`` of their module.
    """
    layers = [
        (id(module), frozenset(module._no_grad), _settings(module, apart.get(id(module), ())))
        for module in model.modules()
    ]
    # Compiled functions, and the random key they captured, belong to one thread.
    return [threading.get_ident(), *layers]


def _settings(module: nn.Module, apart: Collection[str]) -> list[tuple[str, Any]]:
    held = [(key, plain_in(value)) for key, value in module.items() if key not in apart]
    fields = vars(module).items()
    return held + [(k, v if isinstance(v, PLAIN) else id(v)) for k, v in fields if k not in apart]


def plain_in(value: Any) -> list[Any]:
    """The plain values of a list, tuple or dict in a layer, but not those of layers in it."""
    if not isinstance(value, (dict, list, tuple)) or isinstance(value, nn.Module):
        return [value] if isinstance(value, PLAIN) else []
    parts = value.values() if isinstance(value, dict) else value
    return [plain for part in parts for plain in plain_in(part)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; outside each in its own, with the buffers it had.

    A layer that stores what it has seen changes them, and MLX, where it traces again by itself,
    leaves arrays there that nobody can evaluate.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, key, value)
        for module, _ in modes
        for key, value in module.items()
        if key.startswith("_") and isinstance(value, mx.array)
    ]
    model.eval()
    try:
        yield
    finally:
        _set_modes(modes)
        for module, key, value in buffers:
            dict.__setitem__(module, key, value)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The model in training mode inside, each module in its own mode again outside.

    A model whose root is in evaluation mode (mlx-lm loads them so) is put into training mode as a
    whole; otherwise modules that the user put into evaluation mode stay there.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module._set_training_mode(training)
