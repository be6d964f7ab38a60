"""How far two arrays are apart, whatever the layouts of their libraries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal: a largest difference of at most ``atol + rtol * largest value``."""

    rtol: float
    atol: float

    def accepts(self, difference: float, scale: float) -> bool:
        """Whether a difference between arrays of a largest value is rounding."""
        return difference <= self.atol + self.rtol * scale


@dataclass(frozen=True)
class Difference:
    """The largest difference of two arrays.

    Attributes:
        largest: the difference; infinity where the shapes do not fit.
        scale: the largest finite absolute value that was expected.
        moved: the axes of the expected array were moved thus; None where the shapes do not fit.
        expected: the expected array in the layout of the other.
    """

    largest: float
    scale: float
    moved: tuple[int, ...] | None
    expected: np.ndarray


def difference(expected: np.ndarray, got: np.ndarray) -> Difference:
    """Compare in each layout that fits the shape: as it is, channels last, time first."""
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
    found = [
        Difference(_largest(moved, got), scale, axes, moved)
        for axes in _layouts(expected.ndim)
        if (moved := expected.transpose(axes)).shape == got.shape
    ]
    return min(found, key=lambda d: d.largest, default=Difference(np.inf, scale, None, expected))


def _layouts(ndim: int) -> list[tuple[int, ...]]:
    axes = tuple(range(ndim))
    if ndim < 3:
        return [axes]
    return list(dict.fromkeys([axes, (0, *axes[2:], 1), (1, 0, *axes[2:])]))


def _largest(expected: np.ndarray, got: np.ndarray) -> float:
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(expected - got)
    # inf - inf and nan - nan are no difference where both have them.
    agree = (expected == got) | (np.isnan(expected) & np.isnan(got))
    apart = np.where(agree, 0.0, np.where(np.isnan(apart), np.inf, apart))
    return float(apart.max(initial=0))


def same_numbers(expected: np.ndarray, got: np.ndarray, tolerance: Tolerance) -> bool:
    """Whether both hold the same numbers in another order."""
    if expected.size != got.size or not np.isfinite(expected).all():
        return False
    ordered = difference(np.sort(expected, axis=None), np.sort(got, axis=None))
    return tolerance.accepts(ordered.largest, ordered.scale)


def factor(expected: np.ndarray, got: np.ndarray) -> float | None:
    """The constant c with ``got = c * expected``, if there is one that is not 1."""
    if expected.shape != got.shape or not np.isfinite(expected).all():
        return None
    square = float(np.square(expected, dtype=np.float64).sum())
    if not square:
        return None
    ratio = float((expected.astype(np.float64) * got).sum()) / square
    apart = float(np.abs(got - ratio * expected).max(initial=0))
    scale = float(np.abs(got).max(initial=0))
    is_constant = scale > 0 and apart <= 1e-4 * scale and abs(ratio - 1) > 1e-3
    return ratio if is_constant else None
