"""How much memory training takes: measured on a few rows of a batch, and predicted for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mlx_fit._tree import leaves
from mlx_fit.batch import describe, num_rows
from mlx_fit.errors import DataError
from mlx_fit.probing import Probe
from mlx_fit.runtime.memory import format_bytes

MARGIN = 0.9  # of the limit is what a suggested size may take: predictions are not exact
FAR_BELOW = 0.5  # of the limit: a pessimistic prediction under it needs no better one
BAR = 24  # characters
ADDED_UP = ("weights", "optimizer", "other", "gradients", "activations")


class Suggestion(NamedTuple):
    """What would make a step smaller.

    Attributes:
        change: what to write.
        peak_bytes: the peak that is predicted with it.
    """

    change: str
    peak_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step takes of memory. ``print(plan)`` shows a table.

    Attributes:
        batch_size: rows of the batch that it is for.
        peak_bytes: the most bytes that are predicted to be live at a time, all arrays of the
            process included.
        limit_bytes: what MLX can safely hold, see :func:`mlx_fit.runtime.memory.limit_bytes`.
        largest_micro_batch: rows that fit with a margin of a tenth; 0 if not even one does.
        parts: name -> bytes. ``weights``, ``optimizer``, ``other`` (arrays that are there and no
            part of training), ``gradients`` and ``activations`` (what is left of the peak: what the
            batch needs, and new weights and optimizer state) add up to the peak.
            ``activations_per_example`` is what one row more takes.
        suggestions: what would help, each with its predicted peak, the smallest peak first.
    """

    batch_size: int
    peak_bytes: int
    limit_bytes: int
    largest_micro_batch: int
    parts: dict[str, int]
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak_bytes <= self.limit_bytes

    def __str__(self) -> str:
        longest = max(self.peak_bytes, self.limit_bytes, 1)
        rows = [(name, self.parts[name]) for name in ADDED_UP]
        rows += [("peak", self.peak_bytes), ("limit", self.limit_bytes)]
        largest = self.largest_micro_batch
        lines = [
            f"Memory of a training step, batch of {self.batch_size}",
            *[_line(name, size, self.peak_bytes) for name, size in rows[:-2]],
            *[_line(name, size, longest) for name, size in rows[-2:]],
            f"One row more takes {format_bytes(self.parts['activations_per_example'])}. The "
            f"largest micro-batch that fits: {largest or 'none'}.",
            f"{'Fits' if self.fits else 'Does not fit'}."
            + (" What would help:" if self.suggestions else ""),
        ]
        lines += [f"  {format_bytes(peak):>10}  {change}" for change, peak in self.suggestions]
        return "\n".join(lines)


def _line(name: str, size: int, whole: int) -> str:
    bar = "█" * max(round(BAR * size / max(whole, 1)), 1 if size else 0)
    return f"  {name:<12}{format_bytes(size):>11}  {bar}"


class Measured(Protocol):
    """Computes some rows of a batch and tells the peak; see :class:`~mlx_fit.probing.Probe`."""

    largest_bytes: int
    other_bytes: int
    gradient_bytes: int
    cast_bytes: int
    window_bytes: int

    @property
    def state_bytes(self) -> int:
        """Weights, and optimizer state."""

    def peak(self, batch: Any, num_rows: int) -> int:
        """The most bytes that are live."""

    def gradient_peak(self, batch: Any, num_rows: int) -> int:
        """The same without an update."""


@dataclass(frozen=True)
class Growth:
    """Peak memory as a function of the rows of a batch.

    Attributes:
        points: (rows, bytes) that were measured, ascending.
        slope: bytes a row from the last of them on.
        alone: the peak of the gradients alone at the last of them, without an update.
        window: what gradient accumulation would add; 0 where there is some already.
    """

    points: tuple[tuple[int, int], ...]
    slope: float
    alone: int
    window: int

    def at(self, rows: int) -> int:
        """The peak for a number of rows: measured, between two measured ones, or predicted."""
        first, last = self.points[0], self.points[-1]
        if rows >= last[0]:
            return int(last[1] + (rows - last[0]) * self.slope)
        if rows <= first[0]:
            return first[1]
        low = max(point for point in self.points if point[0] <= rows)
        high = min(point for point in self.points if point[0] > rows)
        return int(low[1] + (high[1] - low[1]) * (rows - low[0]) / (high[0] - low[0]))

    @property
    def fewest(self) -> int:
        """The fewest rows that can be computed: two where BatchNorm would have one value."""
        return self.points[0][0]

    def largest(self, limit: float) -> int:
        """The most rows whose peak is within a limit; 0 if not even the fewest are."""
        if self.at(self.fewest) > limit:
            return 0
        low, high = self.fewest, 2 * self.fewest
        while self.at(high) <= limit and high < 1 << 40:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) <= limit else (low, middle)
        return low


def sizes_of(rows: int) -> list[int]:
    """The numbers of rows that are measured: growing up to a quarter, the last two by doubling."""
    last = max(rows // 4, 2 if rows >= 4 else 1)
    half = max(last // 2, 1)
    sizes = [1]
    while sizes[-1] * 4 < half:
        sizes.append(sizes[-1] * 4)
    return sorted({*sizes, half, last})


def measure(probe: Measured, batch: Any, limit: int, far_below: float = 0.0) -> Growth:
    """Measure growing parts of a batch, no further than is safe and, on request, needed.

    Args:
        probe: runs the steps.
        batch: the batch, on the host or the device.
        limit: bytes; it stops before a size that is predicted to exceed them. The whole batch may:
            few rows tell too little to give up by.
        far_below: it stops as well once even four times the growth seen would stay under this
            share of the limit.
    """
    rows = num_rows(batch)
    sizes = sizes_of(rows)
    points = [_first_point(probe, batch, rows, sizes)]
    for following in [size for size in sizes if size > points[0][0]]:
        if _expected(points, probe, batch, rows, following) > limit:
            break
        if far_below and following > 2:
            growth = _growth(points, probe, batch, rows)
            if points[-1][1] + 4 * growth.slope * (rows - points[-1][0]) < far_below * limit:
                return growth
        points.append((following, probe.peak(batch, following)))
    return _growth(points, probe, batch, rows)


def _first_point(probe: Measured, batch: Any, rows: int, sizes: list[int]) -> tuple[int, int]:
    """The peak of one row, or of the next size where one row cannot be computed.

    BatchNorm refuses a single value per channel, and a row may weigh nothing.
    """
    try:
        return 1, probe.peak(batch, 1)
    except ValueError:
        if rows == 1:
            raise
    size = sizes[1] if len(sizes) > 1 else 2
    return size, probe.peak(batch, size)


def _expected(
    points: list[tuple[int, int]], probe: Measured, batch: Any, rows: int, following: int
) -> float:
    """The peak that is expected of the next size.

    One of the largest arrays may be freed a little sooner or later, by chance. Few rows take less
    than that, so it counts once, not with each row.
    """
    (first, lowest), (size, peak) = points[0], points[-1]
    per_row = _bytes_per_row(batch, rows)
    if size > first:
        per_row = max(per_row, (peak - lowest - probe.largest_bytes) / (size - first))
    return peak + per_row * (following - size) + probe.largest_bytes


def _growth(points: list[tuple[int, int]], probe: Measured, batch: Any, rows: int) -> Growth:
    """The line that goes on from the last points.

    Where the update decides the peak of few rows, the whole step tells nothing of how activations
    grow, and gradients alone do. Then the truth lies between "the update hides them" and "they
    come on top", and is at least what gradients alone need.
    """
    size, peak = points[-1]
    per_row = _bytes_per_row(batch, rows)
    alone = probe.gradient_peak(batch, size)
    if len(points) == 1:
        at_rest = probe.other_bytes + probe.state_bytes + probe.gradient_bytes + probe.cast_bytes
        slope = max((alone - at_rest) / size, per_row)
        return Growth(tuple(points), slope, alone, probe.window_bytes)
    before, peak_before = points[-2]
    whole = (peak - peak_before) / (size - before)
    of_gradients = (alone - probe.gradient_peak(batch, before)) / (size - before)
    slope = whole
    if whole < 0.75 * of_gradients and rows > size:
        least = (alone + of_gradients * (rows - size) - peak) / (rows - size)
        slope = max((whole + of_gradients) / 2, least)
    return Growth(tuple(points), max(slope, per_row), alone, probe.window_bytes)


def _bytes_per_row(batch: Any, rows: int) -> float:
    return batch_bytes(batch) / max(rows, 1)


def batch_bytes(batch: Any) -> int:
    """Bytes of a batch's arrays."""
    if isinstance(batch, dict):
        return sum(batch_bytes(part) for part in batch.values())
    if isinstance(batch, (tuple, list)):
        return sum(batch_bytes(part) for part in batch)
    return int(getattr(batch, "nbytes", 0))


def make_plan(
    probe: Probe,
    batch: Any,
    limit: int,
    *,
    accumulation: int = 1,
    far_below: float = 0.0,
    alternatives: Callable[[Growth], list[Suggestion]] = lambda growth: [],
) -> MemoryPlan:
    """Measure and predict.

    Args:
        probe: runs the steps.
        batch: the batch that is planned for.
        limit: bytes that are there.
        accumulation: batches to an update.
        far_below: see :func:`measure`.
        alternatives: other ways to make the step smaller, besides smaller batches.
    """
    rows = num_rows(batch)
    growth = measure(probe, batch, limit, far_below)
    peak, largest = growth.at(rows), growth.largest(MARGIN * limit)
    per_row = round(growth.slope)
    resting = {
        "weights": probe.weight_bytes,
        "optimizer": probe.optimizer_bytes,
        "other": max(probe.other_bytes, 0),
        "gradients": probe.gradient_bytes,
    }
    parts = resting | {
        "activations": max(peak - sum(resting.values()), 0),
        "activations_per_example": per_row,
    }
    suggestions = smaller_batches(growth, rows, limit, accumulation)
    suggestions += alternatives(growth)
    suggestions = [suggestion for suggestion in suggestions if suggestion.peak_bytes < peak]
    suggestions.sort(key=lambda suggestion: suggestion.peak_bytes)
    return MemoryPlan(rows, peak, limit, largest, parts, tuple(suggestions))


def smaller_batches(
    growth: Growth, rows: int, limit: int, accumulation: int, num_ranks: int = 1
) -> list[Suggestion]:
    """About the same update from smaller batches: the largest that fit with a margin, or half.

    ``rows`` are those of one rank, and what is suggested is the batch of all.
    """
    largest = max(growth.largest(MARGIN * limit - growth.window), growth.fewest)
    parts = max(-(-rows // largest), 2)
    size = -(-rows // parts)
    # Parts of equal rows make the very same update, but a number may have no such parts.
    even = next(rows // n for n in range(parts, rows + 1) if rows % n == 0) if rows > 1 else 0
    if even >= max(size / 2, growth.fewest):
        size = even
    if size < growth.fewest or size >= rows:
        return []
    parts = -(-rows // size)
    change = f"batch_size={size * num_ranks} with gradient_accumulation={parts * accumulation}"
    if size * parts != rows:
        change += f" (updates of {size * parts * accumulation * num_ranks} rows)"
    return [Suggestion(change, growth.at(size) + growth.window)]


def check_batch(batch: Any, is_cut: bool = True) -> None:
    """Raise unless it is one batch, with rows.

    Args:
        batch: what is to be planned for.
        is_cut: whether all of its arrays are cut into rows alike.

    Raises:
        DataError: it is something else, holds text, has no rows, or not as many everywhere.
    """
    named = list(leaves(batch))
    if any(isinstance(leaf, (str, bytes)) for _, leaf in named):
        raise DataError(
            "plan(batch) got text; expected a batch of arrays. Take one of those that training "
            "gets: trainer.plan(next(iter(BucketBatches(TextDataset(...), batch_size=8))))."
        )
    is_loader = len(named) == 1 and named[0][1] is batch and not hasattr(batch, "shape")
    several = isinstance(batch, list) and _are_batches(batch)
    if (is_loader and isinstance(batch, Iterable)) or several:
        what = "a list of batches" if several else f"a {type(batch).__name__}"
        one = "batches[0]" if several else "next(iter(loader))"
        raise DataError(f"plan(batch) got {what}; expected one batch: trainer.plan({one}).")
    rows = {path: leaf.shape[0] for path, leaf in named if getattr(leaf, "shape", None)}
    if num_rows(batch) == 0 or (is_cut and 0 in rows.values()):
        raise DataError("The batch has no rows. Give one as training gets it.")
    if is_cut and len(set(rows.values())) > 1:
        raise DataError(
            f"Not all arrays of the batch have as many rows: {describe(batch)}. Give each row its "
            "target and its weight."
        )


def _are_batches(parts: list[Any]) -> bool:
    """Whether a list holds batches, and not the inputs and targets of one."""
    if not all(isinstance(part, (tuple, list)) for part in parts):
        return False
    has_arrays = any(getattr(leaf, "shape", None) for _, leaf in leaves(parts))
    return has_arrays and (len(parts) not in (2, 3) or hasattr(parts[0], "_fields"))
