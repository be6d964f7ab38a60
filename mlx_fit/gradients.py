"""Arithmetic on trees of gradients: norm, clipping, weighting. Runs inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_fit._tree import named_arrays
from mlx_fit.sums import sum_of_squares


def global_norm(gradients: Any, transposed: Collection[str] = ()) -> mx.array:
    """The L2 norm over all gradients, a float32 scalar.

    Args:
        gradients: a tree of arrays.
        transposed: names of those that are faster to read transposed; see :func:`linear_weights`.
    """
    squares = [_sum_of_squares(g, name in transposed) for name, g in named_arrays(gradients)]
    return mx.sqrt(sum(squares[1:], squares[0])).reshape(()) if squares else mx.array(0.0)


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the weights whose gradients lie in memory transposed, as a backward pass ends."""
    modules = model.named_modules()
    linear = (name for name, module in modules if isinstance(module, nn.Linear))
    return {f"{name}.weight" if name else "weight" for name in linear}


def _sum_of_squares(gradient: mx.array, is_transposed: bool) -> mx.array:
    """Of shape (1, 1, 1), in one order wherever the values lie in memory."""
    ordered = gradient.T if is_transposed else gradient  # or flattening were a copy, and slow
    return sum_of_squares(ordered.astype(mx.float32))


def layer_names(model: nn.Module) -> list[str]:
    """The modules that own parameters, trainable or not, by name; the root's own by theirs."""
    owners = (_owner(name) for name, _ in named_arrays(model.parameters()))
    return list(dict.fromkeys(owners))


def layer_norms(model: nn.Module, gradients: Any, transposed: Collection[str]) -> mx.array:
    """The L2 norm of each layer's gradient, float32, in the order of :func:`layer_names`."""
    squares: dict[str, list[mx.array]] = {name: [] for name in layer_names(model)}
    for name, gradient in named_arrays(gradients):
        squares[_owner(name)].append(_sum_of_squares(gradient, name in transposed))
    none = mx.zeros((1, 1, 1))
    layers = [sum(found[1:], found[0]) if found else none for found in squares.values()]
    return mx.sqrt(mx.concatenate(layers).reshape(-1))


def named_norms(model: nn.Module) -> Callable[[dict[str, np.ndarray]], dict[str, float] | None]:
    """The function that turns summed :func:`layer_norms` into means, by name of what is trained."""
    trained = {_owner(name) for name, _ in named_arrays(model.trainable_parameters())}
    names = layer_names(model)

    def compute(state: dict[str, np.ndarray]) -> dict[str, float] | None:
        weight = float(state["weight"])
        if not weight:
            return None
        means = (state["sum"] / weight).tolist()
        return {k: mean for k, mean in zip(names, means, strict=True) if k in trained}

    return compute


def _owner(name: str) -> str:
    """The module of a parameter: its name without the last part, or where there is none, itself."""
    return name.rpartition(".")[0] or name


def clip_by_norm(gradients: Any, norm: mx.array, max_norm: float) -> Any:
    """Scale all gradients down so that their global norm is at most ``max_norm``."""
    max_norm = float(max_norm)  # NumPy's scalars would pull the norm to the host
    scale = max_norm / mx.maximum(norm, max_norm)
    return tree_map(lambda g: g * scale.astype(g.dtype), gradients)


def clip_by_value(gradients: Any, limit: float) -> Any:
    """Clip each component into ``[-limit, limit]``."""
    return tree_map(lambda g: mx.clip(g, -limit, limit), gradients)


def weigh(gradients: Any, weight: mx.array | float) -> Any:
    """Mean gradients times what they weigh, in float32."""
    return tree_map(lambda g: g.astype(mx.float32) * weight, gradients)


def all_finite(gradients: Any) -> mx.array:
    """Whether no gradient holds NaN or infinity, a bool scalar."""
    finite = [mx.isfinite(g).all() for _, g in named_arrays(gradients)]
    return mx.stack(finite).all() if finite else mx.array(True)
