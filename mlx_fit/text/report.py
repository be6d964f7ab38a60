"""What reading text data gave. Imports layer 2: text.planning, text.tally, text.tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_fit.data.order import order
from mlx_fit.text.planning import Batches, bucketed, choose_grid, padding
from mlx_fit.text.tally import Tally
from mlx_fit.text.tokens import TokenStore

__all__ = ["TextReport", "make_report"]

_BAR = 40


@dataclass(frozen=True)
class TextReport:
    """What :class:`~mlx_fit.text.TextDataset` read, kept and lost; ``str(report)`` is for people.

    Attributes:
        name: file, or "the rows". unit: ``"line"`` or ``"row"``: what the tallies' numbers count.
        num_read: rows that were read. blank_lines: lines that are no rows.
        rows: rows that were kept. tokens: their tokens. target_tokens: those that are learned.
        min_length, mean_length, median_length, max_length: tokens of a row; 0 without rows.
        histogram: ``(from, to, rows)``: rows of ``from <= tokens < to``, in powers of two.
        cut: rows cut to ``max_length``, and the tokens lost.
        too_long: rows left out because they exceed ``max_length``.
        nothing_to_learn: rows left out without a single target.
        skipped: bad rows, with why.
        batch_size: rows of the batches that the next two are about.
        padding_random: share of positions that are padding in batches of random order.
        padding_bucketed: the same in batches by length. shapes: their (rows, width) pairs.
    """

    name: str
    unit: str
    num_read: int
    blank_lines: int
    rows: int
    tokens: int
    target_tokens: int
    min_length: int
    mean_length: float
    median_length: float
    max_length: int
    histogram: list[tuple[int, int, int]]
    cut: Tally
    too_long: Tally
    nothing_to_learn: Tally
    skipped: Tally
    batch_size: int
    padding_random: float
    padding_bucketed: float
    shapes: int

    @property
    def dropped(self) -> int:
        """Good rows that were left out."""
        return self.too_long.count + self.nothing_to_learn.count

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.rows:,} of {self.num_read:,} rows, {self.tokens:,} tokens, "
            f"{self.target_tokens:,} of them targets"
        ]
        if self.rows:
            lines += self._lengths()
        lines += self._losses()
        if self.rows:
            lines.append(
                f"padding in batches of {self.batch_size}: {self.padding_random:.1%} in random "
                f"order, {self.padding_bucketed:.1%} by length ({self.shapes} shapes)"
            )
        return "\n".join(lines)

    def _lengths(self) -> list[str]:
        most = max(rows for _, _, rows in self.histogram)
        digits = len(f"{self.histogram[-1][1]:,}")
        bars = [
            f"  {low:>{digits},} to {high - 1:>{digits},}  {rows:>{len(f'{most:,}')},}  "
            f"{'#' * round(_BAR * rows / most)}".rstrip()
            for low, high, rows in self.histogram
        ]
        return [
            f"tokens a row: {self.min_length:,} to {self.max_length:,}, mean "
            f"{self.mean_length:,.1f}, median {self.median_length:,.0f}",
            *bars,
        ]

    def _losses(self) -> list[str]:
        lines = []
        if self.cut.count:
            lines.append(
                f"cut to max_length: {self._counted(self.cut)}; {self.cut.tokens:,} tokens lost"
            )
        if self.too_long.count:
            lines.append(f"dropped, longer than max_length: {self._counted(self.too_long)}")
        if self.nothing_to_learn.count:
            lines.append(f"dropped, nothing to learn: {self._counted(self.nothing_to_learn)}")
        if self.skipped.count:
            units = self.unit if self.skipped.count == 1 else f"{self.unit}s"
            lines.append(f"{self.skipped.count:,} bad {units}: {self.skipped.listed()}")
            lines += [f"  {message}" for message in self.skipped.messages[:5]]
        if self.blank_lines:
            lines.append(f"blank lines: {self.blank_lines:,}")
        return lines

    def _counted(self, tally: Tally) -> str:
        units = self.unit if tally.count == 1 else f"{self.unit}s"
        return f"{tally.count:,} {'row' if tally.count == 1 else 'rows'} ({units} {tally.listed()})"


def make_report(
    *,
    name: str,
    unit: str,
    store: TokenStore,
    tallies: dict[str, Tally],
    batch_size: int,
    max_shapes: int,
) -> TextReport:
    """The report on ``store``, and on batches of ``batch_size`` rows made of it."""
    lengths = np.diff(store.offsets)
    batches = Batches([], [])
    random = 0.0
    if len(lengths):
        grid = choose_grid(lengths, batch_size, max_shapes)
        visited = order(0, 0, len(lengths))[:]
        batches = bucketed(lengths, visited, grid, batch_size)
        random = padding(lengths, _as_they_come(lengths, visited, batch_size))
    shapes = {(len(r), w) for r, w in zip(batches.rows, batches.widths, strict=True)}
    return TextReport(
        name=name,
        unit=unit,
        num_read=store.facts["num_rows"],
        blank_lines=store.facts["num_blank"],
        rows=len(lengths),
        tokens=int(lengths.sum()),
        target_tokens=int(np.count_nonzero(store.mask)),
        min_length=int(lengths.min()) if len(lengths) else 0,
        mean_length=float(lengths.mean()) if len(lengths) else 0.0,
        median_length=float(np.median(lengths)) if len(lengths) else 0.0,
        max_length=int(lengths.max()) if len(lengths) else 0,
        histogram=_histogram(lengths),
        batch_size=batch_size,
        padding_random=random,
        padding_bucketed=padding(lengths, batches),
        shapes=len(shapes),
        **tallies,
    )


def _as_they_come(lengths: np.ndarray, visited: np.ndarray, batch_size: int) -> Batches:
    """Batches of rows in the given order, each as wide as its longest row."""
    rows = [visited[at : at + batch_size] for at in range(0, len(visited), batch_size)]
    return Batches(rows, [int(lengths[row].max()) for row in rows])


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(lengths):
        return []
    # frexp gives the exponent of the next power of two, exactly.
    exponents = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(exponents)
    return [
        (1 << (exponent - 1), 1 << exponent, int(counts[exponent]))
        for exponent in range(int(exponents.min()), len(counts))
    ]
