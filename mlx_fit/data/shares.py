"""The share of a batch that one of several ranks reads. Imports layer 2: data.arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mlx_fit.checks import natural
from mlx_fit.data.arrays import flatten, skeleton, unflatten
from mlx_fit.errors import ConfigurationError

__all__ = ["Rates", "Sharded", "Splittable", "check_replica", "share", "sizes_by_rate"]

#: Rows a second of each rank, in any unit; None: all are alike.
Rates = tuple[float, ...] | None


def share(rows: Any, num_replicas: int, rank: int, rates: Rates = None) -> Any:
    """The part of a batch's rows that rank ``rank`` reads: a slice, in order.

    The parts of all ranks together are the batch. Their sizes differ by one row at most, and the
    first ranks have the longer ones, unless the ranks have rates.

    Args:
        rows: a sequence that can be sliced.
        num_replicas: ranks.
        rank: 0 to ``num_replicas - 1``.
        rates: see :func:`sizes_by_rate`.

    Example:
        >>> [share(range(8), 3, rank) for rank in range(3)]
        [range(0, 3), range(3, 6), range(6, 8)]
    """
    if rates is not None:
        sizes = sizes_by_rate(len(rows), rates)
        first = sum(sizes[:rank])
        return rows[first : first + sizes[rank]]
    each, rest = divmod(len(rows), num_replicas)
    start = rank * each + min(rank, rest)
    return rows[start : start + each + (rank < rest)]


@lru_cache(maxsize=64)
def sizes_by_rate(num_rows: int, rates: tuple[float, ...]) -> tuple[int, ...]:
    """How many rows each rank reads so that the last of them is done first.

    That is the least max(size / rate). Every rank keeps a row, as long as there are as many.

    Args:
        num_rows: of the batch.
        rates: rows a second of each rank, in any unit.

    Example:
        >>> sizes_by_rate(32, (300.0, 100.0)), sizes_by_rate(10, (3.0, 1.0))
        ((24, 8), (8, 2))
    """
    whole = sum(rates)
    sizes = [max(1, int(num_rows * rate / whole)) for rate in rates]
    if sum(sizes) > num_rows:  # few rows for many ranks
        sizes = [1 if rank < num_rows else 0 for rank in range(len(rates))]
    for _ in range(num_rows - sum(sizes)):
        ends = [(size + 1) / rate for size, rate in zip(sizes, rates, strict=True)]
        sizes[ends.index(min(ends))] += 1
    return tuple(sizes)


def check_replica(num_replicas: Any, rank: Any) -> tuple[int, int]:
    """The two arguments, checked.

    Raises:
        ConfigurationError: they are no number of ranks and one of them.
    """
    num_replicas = natural("num_replicas", num_replicas, 1)
    rank = natural("rank", rank)
    if rank >= num_replicas:
        raise ConfigurationError(
            f"rank={rank} of num_replicas={num_replicas}; ranks are counted from 0."
        )
    return num_replicas, rank


class Splittable(ABC):
    """A loader of batches that are the same on all ranks, and are split row by row.

    Attributes:
        seed: of its order.
        draws_seed: whether none was given.
    """

    seed: int
    draws_seed: bool

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position, and what decides the batches."""


class Sharded:
    """A ``fetch(rows, epoch, batch)`` of one rank's share of the rows.

    A rank that gets none (a batch of fewer rows than ranks) reads one row to learn its structure,
    and gives arrays of no rows.
    """

    def __init__(
        self,
        fetch: Callable[[Any, int, int], Any],
        num_replicas: int,
        rank: int,
        rates: Rates = None,
    ) -> None:
        self._fetch = fetch
        self._num_replicas = num_replicas
        self._rank = rank
        self._rates = rates

    def __call__(self, rows: Any, epoch: int, batch: int) -> Any:
        own = share(rows, self._num_replicas, self._rank, self._rates)
        if len(own):
            return self._fetch(own, epoch, batch)
        return without_rows(self._fetch(rows[:1], epoch, batch))


def without_rows(batch: Any) -> Any:
    """A batch's structure and dtypes, with no rows."""
    return unflatten(skeleton(batch), iter([leaf[:0] for _, leaf in flatten(batch)]))
