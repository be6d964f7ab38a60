"""Weights that PyTorch computes from others: ``weight_norm`` and ``spectral_norm``.

Their ``state_dict`` holds what the weight is made of; the weight itself, as the module uses it in
evaluation, is computed here. Formulas: Salimans and Kingma, "Weight Normalization" (2016), eq. 2;
Miyato et al., "Spectral Normalization for GANs" (2018), section 2.1. Both ways of PyTorch are
known: ``torch.nn.utils.parametrizations`` and the older hooks of ``torch.nn.utils``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import mlx.core as mx
import numpy as np

_INSIDE = ".parametrizations."


def folded(state: dict[str, mx.array], kept: Collection[str] = ()) -> dict[str, mx.array]:
    """The state with such weights in the place of their parts; others are left as they are.

    Args:
        state: arrays by their torch names.
        kept: last parts of names that the model has itself, such as ``"weight_g"``.

    >>> state = {"fc.weight_g": mx.array([[2.0]]), "fc.weight_v": mx.array([[3.0, 4.0]])}
    >>> {name: array.tolist() for name, array in folded(state).items()}
    {'fc.weight': [[1.2000000476837158, 1.600000023841858]]}
    """
    result: dict[str, mx.array] = {}
    done: set[str] = set()
    for name in state:
        if name in done:
            continue
        is_own = name.rpartition(".")[2] in kept
        found = None if is_own else _weight_of(name, state)
        if found is None:
            result[name] = state[name]
            continue
        whole, parts, weight = found
        result[whole] = weight
        done |= parts
    return result


def _weight_of(name: str, state: dict[str, mx.array]) -> tuple[str, set[str], mx.array] | None:
    """The weight that a tensor is a part of: its name, the names of all parts, and its value."""
    for whole, magnitude, direction in _pairs(name):
        if magnitude in state and direction in state and whole not in state:
            scale, vector = state[magnitude], state[direction]
            if _scales(scale, vector):
                return whole, {magnitude, direction}, _weight_norm(scale, vector)
    for whole, raw, left, right in _triples(name):
        if raw in state and left in state and right in state and whole not in state:
            weight = _spectral_norm(state[raw], state[left], state[right])
            if weight is not None:
                return whole, {raw, left, right}, weight
    return None


def _pairs(name: str) -> list[tuple[str, str, str]]:
    """The weight, its magnitude and its direction, as weight_norm names them."""
    if _INSIDE in name:
        base = name.rpartition(".")[0]
        return [(_plain(base), f"{base}.original0", f"{base}.original1")]
    base = name.removesuffix("_g").removesuffix("_v")
    return [(base, f"{base}_g", f"{base}_v")] if base != name else []


def _triples(name: str) -> list[tuple[str, str, str, str]]:
    """The weight, what it is made of, and its singular vectors, as spectral_norm names them."""
    if _INSIDE in name:
        base = name.removesuffix(".original").removesuffix(".0._u").removesuffix(".0._v")
        return [(_plain(base), f"{base}.original", f"{base}.0._u", f"{base}.0._v")]
    for suffix in ("_orig", "_u", "_v"):
        if name.endswith(suffix):
            base = name.removesuffix(suffix)
            return [(base, f"{base}_orig", f"{base}_u", f"{base}_v")]
    return []


def _plain(base: str) -> str:
    """``a.weight`` of ``a.parametrizations.weight``; so, too, at the top of a module."""
    return base.replace(_INSIDE, ".")


def _scales(scale: mx.array, vector: mx.array) -> bool:
    """Whether one is the other's magnitude: along one axis, or of the whole."""
    if scale.ndim != vector.ndim:
        return scale.ndim == 0
    pairs = zip(scale.shape, vector.shape, strict=True)
    return all(one in (1, size) for one, size in pairs) and sum(n > 1 for n in scale.shape) <= 1


def _weight_norm(scale: mx.array, vector: mx.array) -> mx.array:
    axes = [axis for axis in range(vector.ndim) if scale.ndim == 0 or scale.shape[axis] == 1]
    wide = vector.astype(mx.float32)
    norm = mx.sqrt(mx.square(wide).sum(axes, keepdims=True))
    return (wide * (scale.astype(mx.float32) / norm)).astype(vector.dtype)


def _spectral_norm(raw: mx.array, left: mx.array, right: mx.array) -> mx.array | None:
    """The weight by its largest singular value; None where the vectors are none of its.

    The rows of the matrix are axis 0, for transposed convolutions axis 1. Where both fit, the one
    counts whose transposed product with ``left`` has the direction of ``right``.
    """
    wide, u, v = raw.astype(mx.float32), left.astype(mx.float32), right.astype(mx.float32)
    best: tuple[float, mx.array] | None = None
    for axis in range(min(raw.ndim, 2)):
        rows = raw.shape[axis]
        if u.shape != (rows,) or v.shape != (math.prod(raw.shape) // max(rows, 1),):
            continue
        matrix = mx.moveaxis(wide, axis, 0).reshape(rows, -1)
        back = matrix.T @ u
        likeness = float(np.array(back @ v / mx.maximum(mx.linalg.norm(back), 1e-12)))
        if best is None or likeness > best[0] + 1e-4:
            best = likeness, (wide / (u @ (matrix @ v))).astype(raw.dtype)
    return None if best is None else best[1]
