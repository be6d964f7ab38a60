"""Ranks start with the same weights, and can be looked at for any difference later."""

from __future__ import annotations

import warnings
from hashlib import blake2b
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit._tree import RandomState, assign, named_arrays
from mlx_fit.communicator import gather, of_first
from mlx_fit.distributed.ring import Ring
from mlx_fit.errors import PlanMismatchError


def arrays_of(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by name."""
    return {name: value for name, value in named_arrays(tree) if isinstance(value, mx.array)}


def plan_of(model: Any) -> dict[str, str]:
    """Names, shapes and dtypes of a model's parameters, and which of them are trained."""
    trained = {name for name, _ in named_arrays(model.trainable_parameters())}
    return {
        name: f"{tuple(value.shape)} {str(value.dtype).removeprefix('mlx.core.')}"
        + ("" if name in trained else ", frozen")
        for name, value in named_arrays(model.parameters())
    }


def check_plan(ring: Ring, plan: dict[str, str]) -> None:
    """Raise on all ranks unless they have the same parameters.

    Raises:
        PlanMismatchError: names the first parameter that differs.
    """
    plans = gather(ring, plan, "plans")
    for rank, other in enumerate(plans):
        if other == plans[0]:
            continue
        names = [*plans[0], *(name for name in other if name not in plans[0])]
        first = next((n for n in names if plans[0].get(n) != other.get(n)), "their order")
        raise PlanMismatchError(
            f"Rank 0 and rank {rank} have different models: {first} is "
            f"{plans[0].get(first, 'missing')} on rank 0 and {other.get(first, 'missing')} on rank "
            f"{rank}. Build the same model, and freeze the same layers, on every rank.",
            first=first,
        )


def align(ring: Ring, trees: dict[str, Any]) -> None:
    """Give all ranks the arrays of rank 0, with a warning if another rank had others.

    Args:
        ring: the ranks.
        trees: what they are, for the message -> containers of arrays, changed in place.
    """
    for what, tree in trees.items():
        found = gather(ring, digest(tree), "weights")
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        if not others:
            continue
        warnings.warn(
            f"{what} of rank 0 are used on all ranks: those of rank "
            f"{', '.join(map(str, others))} were different. Build them from the same seed or file "
            "to be sure that it is what you want.",
            stacklevel=4,
        )
        assign(tree, from_first(ring, arrays_of(tree)).items())
        mx.eval(tree)


def from_first(ring: Ring, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Rank 0's arrays on all ranks, bit for bit; the others' give shapes and dtypes."""
    found = {}
    for name, array in arrays.items():
        # As bytes: a sum of floats would turn -0.0 into 0.0, and NaNs into others.
        raw = array.reshape(-1).view(mx.uint8) if array.size else mx.zeros((1,), mx.uint8)
        (total,) = ring.sum([raw if ring.rank == 0 else mx.zeros_like(raw)], "weights")
        found[name] = total.view(array.dtype).reshape(array.shape) if array.size else array
    return found


def digest(tree: Any) -> str:
    """A hash of the arrays of a tree, names, shapes and bits. Reads the device."""
    found = blake2b(digest_size=16)
    for name, array in arrays_of(tree).items():
        found.update(f"{name}{array.shape}{array.dtype}".encode())
        found.update(_bytes(array))
    return found.hexdigest()


def _bytes(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes() if array.size else b""


def align_key(ring: Ring) -> None:
    """Rank 0's random key on all ranks."""
    words = RandomState().words
    first = of_first(ring, words)
    if first != words:
        RandomState(first).restore()
