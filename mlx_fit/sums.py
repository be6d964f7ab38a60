"""Sums that keep their digits."""

from __future__ import annotations

import math

import mlx.core as mx


def long_sum(values: mx.array) -> mx.array:
    """The sum over all axes, a scalar, exact to float32 rounding at any length.

    MLX's CPU sums are naive: over 8 million values one is off in the second digit. So about the
    square root of the length of rows are added up first, column by column, whatever the shape, and
    then the columns: in that order MLX adds several numbers at a time. Flattened values also have
    one order in memory, and so one result, whatever made them.
    """
    values = values.reshape(-1)
    if values.size <= 4096:
        return values.sum()
    width = math.isqrt(values.size)
    whole = values.size // width * width
    return values[:whole].reshape(-1, width).sum(0).sum() + values[whole:].sum()
