"""What is trained: the parameters that are not frozen, and gradients of their structure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_fit._tree import assign, named_arrays
from mlx_fit.errors import CheckpointMismatchError, ConfigurationError


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, _ in named_arrays(model.trainable_parameters())]


def set_trainable(model: nn.Module, names: Collection[str]) -> None:
    """Freeze and thaw parameters so that those of ``names`` are trained, and no others."""
    for path, module in model.named_modules():
        for key, value in module.items():
            place = f".{path}.{key}" if path else f".{key}"
            held: Any = tree_flatten(value, place, lambda part: isinstance(part, nn.Module))
            # What lies in a module below is that one's to freeze.
            if not key.startswith("_") and all(isinstance(leaf, mx.array) for _, leaf in held):
                is_trained = any(name in names for name, _ in held)
                (module._no_grad.discard if is_trained else module._no_grad.add)(key)


def frozen_keys(model: nn.Module) -> list[set[str]]:
    """What each layer has frozen: its own set, which freezing and thawing change in place."""
    return [module._no_grad for module in model.modules()]


def fitted(gradients: Any, parameters: Any) -> Any:
    """Gradients in the structure of parameters: others are left out, missing ones are zero."""
    known = dict(named_arrays(gradients))
    return tree_map_with_path(
        lambda name, p: known[name] if name in known else mx.zeros(p.shape), parameters
    )


def load_window(window: list[Any], arrays: dict[str, mx.array]) -> None:
    """Put saved gradients into a window of the present parameters' structure."""
    names = {name for name, _ in named_arrays(window)}
    if names != arrays.keys():
        missing, extra = sorted(names - arrays.keys()), sorted(arrays.keys() - names)
        raise CheckpointMismatchError(
            "The checkpoint holds an open accumulation window of other parameters: missing "
            f"{', '.join(missing) or 'nothing'}; extra {', '.join(extra) or 'nothing'}.",
            missing=missing,
            extra=extra,
        )
    assign(window, arrays.items())


def check_no_new(model: nn.Module, before: Any) -> None:
    """Raise if the forward pass stored an array under a public name, as a parameter."""
    known = {name for name, _ in named_arrays(before)}
    new = [name for name, _ in named_arrays(model.trainable_parameters()) if name not in known]
    if new:
        raise ConfigurationError(
            f"The forward pass stored arrays as {', '.join(new)}, which makes them parameters of "
            "the model. Start their names with an underscore."
        )


def check_trained(model: nn.Module) -> None:
    """Raise unless there is something to train, all of it with a gradient."""
    named = named_arrays(model.trainable_parameters())
    if not named:
        raise ConfigurationError(
            "The model has no trainable parameters: everything is frozen. Call unfreeze() on the "
            "layers to train."
        )
    wrong = [name for name, value in named if not mx.issubdtype(value.dtype, mx.inexact)]
    if wrong:
        raise ConfigurationError(
            f"Trainable parameters that hold integers have no gradient: {', '.join(wrong)}. "
            "Freeze them, or start their names with an underscore to make them buffers."
        )
