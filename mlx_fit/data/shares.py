"""The share of a batch that one of several ranks reads. Imports layer 2: data.arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from mlx_fit.checks import natural
from mlx_fit.data.arrays import flatten, skeleton, unflatten
from mlx_fit.errors import ConfigurationError

__all__ = ["Sharded", "Splittable", "check_replica", "share", "without_rows"]


def share(rows: Any, num_replicas: int, rank: int) -> Any:
    """The part of a batch's rows that rank ``rank`` reads: a slice, in order.

    The parts of all ranks together are the batch, and their sizes differ by one row at most; the
    first ranks have the longer ones.

    Args:
        rows: a sequence that can be sliced.
        num_replicas: ranks.
        rank: 0 to ``num_replicas - 1``.

    Example:
        >>> [share(range(8), 3, rank) for rank in range(3)]
        [range(0, 3), range(3, 6), range(6, 8)]
    """
    each, rest = divmod(len(rows), num_replicas)
    start = rank * each + min(rank, rest)
    return rows[start : start + each + (rank < rest)]


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

    def __init__(self, fetch: Callable[[Any, int, int], Any], num_replicas: int, rank: int) -> None:
        self._fetch = fetch
        self._num_replicas = num_replicas
        self._rank = rank

    def __call__(self, rows: Any, epoch: int, batch: int) -> Any:
        own = share(rows, self._num_replicas, self._rank)
        if len(own):
            return self._fetch(own, epoch, batch)
        return without_rows(self._fetch(rows[:1], epoch, batch))


def without_rows(batch: Any) -> Any:
    """A batch's structure and dtypes, with no rows."""
    return unflatten(skeleton(batch), iter([leaf[:0] for _, leaf in flatten(batch)]))
