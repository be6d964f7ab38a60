"""The table of what was loaded from where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoadedArray:
    """One array that was loaded.

    Attributes:
        name, shape, dtype: the array in the MLX model.
        source, source_shape: the tensor, or the tensors joined with ``+``, and the first's shape.
        note: what was changed: the layout, packed parts, biases added.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    source_shape: tuple[int, ...]
    note: str


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` did; ``print(report)`` shows it as a table.

    Attributes:
        loaded: one row for each array of the model that was set.
        tied: torch names that are the same tensor as one that was loaded.
        ignored: torch names that were left out: counters of batches, dropped by ``rename``, or
            extra with ``strict=False``.
        missing: arrays of the model that were left as they were (``strict=False``).
    """

    loaded: list[LoadedArray]
    tied: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (row.name, str(row.shape), row.dtype, row.source, str(row.source_shape), row.note)
            for row in self.loaded
        ]
        lines = [table(("array", "shape", "dtype", "tensor", "shape", "changed"), rows)]
        for title in ("tied", "ignored", "missing"):
            if names := getattr(self, title):
                lines.append(f"{title}: {', '.join(names)}")
        return "\n".join(lines)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under headings, in columns as wide as they need."""
    rows = [headings, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
