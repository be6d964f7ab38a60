"""Whether all ranks have the same weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit._tree import named_arrays
from mlx_fit.distributed.ring import Ring
from mlx_fit.errors import ParameterDesyncError

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint32}


def checksum(array: mx.array) -> mx.array:
    """A uint32 that any single bit of the array changes.

    Words of it, each times an odd number of its place, summed modulo 2^32.
    """
    if not array.size:
        return mx.array(0, mx.uint32)
    words = array.reshape(-1).view(_WORDS[array.dtype.size]).astype(mx.uint32)
    return (words * (2 * mx.arange(words.size, dtype=mx.uint32) + 1)).sum()


def check_equal(ring: Ring, model: nn.Module, step: int) -> None:
    """Raise on all ranks unless all have the same parameters, bit for bit; collective.

    Raises:
        ParameterDesyncError: names the first parameter that differs.
    """
    names = [name for name, _ in named_arrays(model.parameters())]
    own = mx.stack([checksum(value) for _, value in named_arrays(model.parameters())])
    found = ring.gather_arrays(own.reshape(1, -1), "check")
    is_equal = np.array((found == found[:1]).all(0))
    differing = [name for name, same in zip(names, is_equal, strict=True) if not same]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        error = ParameterDesyncError(
            f"After step {step} the ranks have different weights: {differing[0]}{more}. Go on from "
            "an earlier checkpoint. Somebody has changed weights on one rank only, or the machines "
            "compute differently.",
            step=step,
            first=differing[0],
        )
        ring.knows(error)
        raise error
