"""Batches that will not fit are refused before anything of them is computed.

On a CPU an allocation that fails ends the process without an exception, so it must not come to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import leaves, named_arrays
from mlx_fit.batch import num_rows
from mlx_fit.errors import DataError, OutOfMemoryError, from_runtime_error
from mlx_fit.plan import FAR_BELOW, Growth
from mlx_fit.runtime.memory import active_bytes, address_space_left, format_bytes, limits

MUCH_LARGER = 1.25  # times the largest batch that was found to fit
CAUTION = 16  # numbers that are kept for each output of each layer, at most, in a usual model
HEAD_SIZE = 64  # smallest usual size of an attention head: so many outputs for a row of scores


class Guard(ABC):
    """Compares what a batch will take of memory with what there is: ``guard(batch)``.

    Args:
        model: what computes.
        what: is computed, for the message.
        has_limit: whether the user set a memory limit; then every first batch is measured.
        num_ranks: that share each batch; ``batch_size`` is that of all of them.
    """

    def __init__(self, model: nn.Module, what: str, has_limit: bool, num_ranks: int = 1) -> None:
        self._model = model
        self._what = what
        self._has_limit = has_limit
        self._num_ranks = num_ranks
        self._safe_size = 0  # numbers in the largest batch that was found to fit
        self._refused: tuple[Growth, float] | None = None  # and the numbers in one of its rows

    @abstractmethod
    def growth(self, batch: Any, limit: int) -> Growth:
        """How memory grows with the rows, measured on some of them; leaves no trace."""

    @abstractmethod
    def advice(self, growth: Growth, rows: int, limit: int) -> str:
        """What to change where so many rows exceed the limit."""

    def __call__(self, batch: Any) -> None:
        """Raise if a batch that is larger than those before will not fit.

        Raises:
            OutOfMemoryError: nothing was computed, everything is as it was.
        """
        size, rows = _numbers(batch), _rows_of(batch)
        if rows == 0 or size <= MUCH_LARGER * self._safe_size:
            return
        if self._refused is not None:  # half of it, perhaps: what was measured tells
            refused, per_row = self._refused
            self._judge(refused, math.ceil(size / per_row), rows)
        elif rows > 1 and (growth := self._measured(batch, rows)) is not None:
            self._refused = growth, size / rows
            self._judge(growth, rows, rows)
            self._refused = None
        self._safe_size = size

    def _measured(self, batch: Any, rows: int) -> Growth | None:
        """How memory grows with the rows; None where that is not needed, or cannot be told."""
        limit = min(limits().values())
        has_limit = self._has_limit or address_space_left() is not None
        if not has_limit and self._rough_bound(batch, rows) < FAR_BELOW * limit:
            return None
        try:
            return self.growth(batch, limit)
        except Exception as error:
            typed = from_runtime_error(error, batch_size=rows)
            if isinstance(typed, OutOfMemoryError):
                raise typed from error
            return None  # the whole batch will show what is wrong, if anything is

    def _judge(self, growth: Growth, equal_rows: int, rows: int) -> None:
        """Raise if as many rows as were measured, ``equal_rows``, need more than there is."""
        found = limits()
        name = min(found, key=lambda name: found[name])
        needed, limit = growth.at(equal_rows), found[name]
        if needed <= limit:
            return
        size = f"batch_size={rows}" if self._num_ranks == 1 else f"{rows} rows on this rank"
        raise OutOfMemoryError(
            f"{self._what} with {size} is predicted to need {format_bytes(needed)}, "
            f"and the limit is {format_bytes(limit)} ({name}). Nothing was computed.",
            needed_bytes=needed,
            limit_bytes=limit,
            batch_size=rows,
            suggestion=self.advice(growth, rows, limit),
            kind="foreseen",
        )

    def _rough_bound(self, batch: Any, rows: int) -> int:
        """More bytes than a usual model takes for the batch, from shapes alone."""
        outputs = sum(max(a.shape) for _, a in named_arrays(self._model.parameters()) if a.ndim > 1)
        positions = max([_positions(leaf) for _, leaf in leaves(batch)], default=rows)
        scores = 1 + positions / rows / HEAD_SIZE  # attention compares each position with each
        state = sum(a.nbytes for _, a in named_arrays(self._model.state) if isinstance(a, mx.array))
        activations = positions * outputs * CAUTION * 4 * scores
        return int(active_bytes() + 4 * state + activations)


def _rows_of(batch: Any) -> int:
    """Rows of a batch; 0 where an objective has batches of another kind."""
    try:
        return num_rows(batch)
    except DataError:
        return 0


def _numbers(batch: Any) -> int:
    """How many numbers the arrays of a batch hold."""
    return sum(_size(leaf) for _, leaf in leaves(batch))


def _size(leaf: Any) -> int:
    return math.prod(getattr(leaf, "shape", ()))


def _positions(leaf: Any) -> int:
    """Places that a layer is applied to: tokens, pixels, rows."""
    shape = tuple(getattr(leaf, "shape", ()))
    is_float = "float" in str(getattr(leaf, "dtype", ""))
    return math.prod(shape[:-1]) if is_float and len(shape) > 1 else math.prod(shape)
