"""Arithmetic on trees of gradients: norm, clipping, weighting. Runs inside the compiled step."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_fit._tree import named_arrays
from mlx_fit.sums import long_sum


def global_norm(gradients: Any) -> mx.array:
    """The L2 norm over all gradients, a float32 scalar."""
    squares = [long_sum(g.astype(mx.float32).square()) for _, g in named_arrays(gradients)]
    return mx.sqrt(sum(squares[1:], squares[0])) if squares else mx.array(0.0)


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
