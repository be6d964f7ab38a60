"""What makes batches of rows, wherever it runs: the caller's thread, another, or a process.

Imports layer 2: data.arrays, data.batching, data.dataset, data.fetch, data.shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_fit.data.arrays import flatten
from mlx_fit.data.batching import from_stream
from mlx_fit.data.dataset import seeded
from mlx_fit.data.fetch import fetcher, stream_fetcher
from mlx_fit.data.shares import Rates, Sharded
from mlx_fit.errors import DataError
from mlx_fit.foreign import is_mlx_array

__all__ = ["MlxWatch", "Prepared", "Recipe", "refuse_mlx"]


class Prepared(NamedTuple):
    """A batch, its number of rows, and the state of a stateful stream after it."""

    batch: Any
    num_rows: int
    dataset_state: Any = None


@dataclass(frozen=True)
class Recipe:
    """A dataset and how its rows become batches.

    Attributes:
        dataset: rows by index, or an iterable of rows (a stream).
        collate_fn: the user's, or None for ours.
        batch_size: rows of a batch; None where a batch_sampler decides.
        drop_last: leave out a short last batch.
        is_stream: the dataset can only be iterated over.
        num_replicas, rank: ranks that share each batch, and which of them this is.
        rates: how fast they are, where that decides on their shares.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None
    batch_size: int | None
    drop_last: bool
    is_stream: bool
    num_replicas: int = 1
    rank: int = 0
    rates: Rates = None

    @property
    def is_stateful(self) -> bool:
        """Whether the dataset is a stream that can save its place."""
        return self.is_stream and all(
            callable(getattr(self.dataset, method, None))
            for method in ("state_dict", "load_state_dict")
        )

    @property
    def is_one_shot(self) -> bool:
        """Whether the dataset is an iterator, which cannot start again."""
        return self.is_stream and hasattr(self.dataset, "__next__")

    def fetch(
        self, seed: int, epoch: int, check: Callable[[Any], None] | None = None
    ) -> Callable[[Any, int, int], Any]:
        """A function of (rows, epoch, number of the batch); ``check`` sees all that users give.

        It is given the rows of the whole batch, and reads this rank's share of them.
        """
        fetch: Callable[[Any, int, int], Any]
        if self.is_stream:
            fetch = stream_fetcher(self.batch_size or 1, self.collate_fn, check)
        else:
            fetch = fetcher(seeded(self.dataset, seed, epoch), self.collate_fn, check)
        if self.num_replicas == 1:
            return fetch
        return Sharded(fetch, self.num_replicas, self.rank, self.rates)

    def stream(self, epoch: int, start: int, dataset_state: Any) -> Iterator[list[Any]]:
        """The rows of a stream in batches, from sample ``start`` on."""
        size = self.batch_size or 1
        return from_stream(self.dataset, size, self.drop_last, epoch, start, dataset_state)

    def state(self) -> Any:
        """What a stateful stream says of its place; None for others."""
        # A copy, because the dataset reads on.
        return deepcopy(self.dataset.state_dict()) if self.is_stateful else None


class MlxWatch:
    """Notes whether any of the values it is shown holds an MLX array.

    Attributes:
        found: it has seen one.
    """

    def __init__(self) -> None:
        self.found = False

    def __call__(self, value: Any) -> None:
        self.found = self.found or _holds_mlx(value)


def refuse_mlx(value: Any) -> None:
    """The check in a worker process, which cannot hand MLX arrays over.

    Raises:
        DataError: ``value`` holds one.
    """
    if _holds_mlx(value):
        raise DataError(
            "A worker process got an MLX array from the dataset or collate_fn. Return NumPy "
            "arrays there (np.array(value)), or use num_workers=0."
        )


def _holds_mlx(value: Any) -> bool:
    return any(is_mlx_array(leaf) for _, leaf in flatten(value))
