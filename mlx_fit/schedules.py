"""Learning-rate schedules with a warm-up, for any optimizer of MLX.

Each function returns a callable of the number of updates already made. MLX's optimizers ask for the
rate before they count, so the first update sees 0, and

    rate of update s during the warm-up = peak * (s + 1) / warmup_steps:

the first update already moves the weights, and update ``warmup_steps - 1`` runs at the peak. This
is one update ahead of the schedules of Hugging Face transformers, whose first update has rate 0;
from ``warmup_steps`` on both are the same. Schedules count updates, not micro-batches or ranks.

For other shapes see ``mlx.optimizers``: ``cosine_decay``, ``linear_schedule``, ``step_decay``,
``exponential_decay``, and ``join_schedules`` to chain them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

import mlx.core as mx

from mlx_fit.errors import ConfigurationError

__all__ = ["Schedule", "constant_warmup", "warmup_cosine", "warmup_linear"]

Schedule = Callable[[int | mx.array], mx.array]


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int, floor: float = 0.0) -> Schedule:
    """Linear warm-up to ``peak``, then half a cosine down to ``floor``.

    The decay is that of SGDR (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, eq. 5),
    in the form ``sin(x)**2``, which stays above 0 in float32 until the end.

    Args:
        peak: highest rate.
        total_steps: updates of the whole run; from there on the rate is exactly ``floor``.
        warmup_steps: updates of the warm-up, fewer than ``total_steps``; 0: none.
        floor: lowest rate of the decay, not above ``peak``.

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> rate = warmup_cosine(peak=0.1, total_steps=10, warmup_steps=2)
        >>> [round(rate(step).item(), 4) for step in (0, 1, 2, 6, 10)]
        [0.05, 0.1, 0.1, 0.05, 0.0]
    """

    def decay(remaining: mx.array) -> mx.array:
        return mx.square(mx.sin(math.pi / 2 * remaining))

    return _warmup_decay(peak, total_steps, warmup_steps, floor, decay)


def warmup_linear(peak: float, total_steps: int, warmup_steps: int, floor: float = 0.0) -> Schedule:
    """Linear warm-up to ``peak``, then a straight line down to ``floor``.

    Args:
        peak: highest rate.
        total_steps: updates of the whole run; from there on the rate is exactly ``floor``.
        warmup_steps: updates of the warm-up, fewer than ``total_steps``; 0: none.
        floor: lowest rate of the decay, not above ``peak``.

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> rate = warmup_linear(peak=0.1, total_steps=10, warmup_steps=2, floor=0.02)
        >>> [round(rate(step).item(), 4) for step in (0, 1, 2, 6, 10)]
        [0.05, 0.1, 0.1, 0.06, 0.02]
    """
    return _warmup_decay(peak, total_steps, warmup_steps, floor, lambda remaining: remaining)


def constant_warmup(peak: float, warmup_steps: int) -> Schedule:
    """Linear warm-up to ``peak``, which then stays.

    Args:
        peak: highest rate.
        warmup_steps: updates of the warm-up; 0: none.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    _check_peak(peak)
    warmup_steps = _count("warmup_steps", warmup_steps)

    def schedule(step: int | mx.array) -> mx.array:
        return peak * _warmup(step, warmup_steps)

    return schedule


def _warmup_decay(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    floor: float,
    decay: Callable[[mx.array], mx.array],
) -> Schedule:
    _check_peak(peak)
    total_steps = _count("total_steps", total_steps)
    warmup_steps = _count("warmup_steps", warmup_steps)
    if warmup_steps >= total_steps:
        raise ConfigurationError(
            f"warmup_steps={warmup_steps} must be below total_steps={total_steps}."
        )
    if not 0 <= floor <= peak:
        raise ConfigurationError(f"floor={floor} must be between 0 and peak={peak}.")

    def schedule(step: int | mx.array) -> mx.array:
        # In integers up to here: MLX counts in uint64, which must not go below 0, and float32 would
        # lose steps beyond 2**24.
        left = total_steps - mx.minimum(mx.maximum(step, warmup_steps), total_steps)
        share = decay(left.astype(mx.float32) / (total_steps - warmup_steps))
        falling = peak * share + floor * (1 - share)
        return mx.where(step < warmup_steps, peak * _warmup(step, warmup_steps), falling)

    return schedule


def _warmup(step: int | mx.array, warmup_steps: int) -> mx.array:
    """The share of the peak, rising to 1 within ``warmup_steps`` updates."""
    updates = mx.minimum(step, max(warmup_steps - 1, 0)).astype(mx.float32) + 1
    return updates / max(warmup_steps, 1)


def _check_peak(peak: float) -> None:
    if not 0 < peak < math.inf:
        raise ConfigurationError(f"peak={peak} must be positive and finite.")


def _count(name: str, count: int) -> int:
    if not isinstance(count, Integral) or count < 0:
        raise ConfigurationError(f"{name}={count} must be an int, 0 or more.")
    return int(count)
