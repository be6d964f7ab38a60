"""DataLoader: batches of a dataset, in an order that can be resumed.

Imports layer 2: data.batching, data.dataset, data.fetch, data.options.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

from mlx_fit.checks import boolean, natural
from mlx_fit.data.batching import from_batch_sampler, from_order, from_sampler, from_stream
from mlx_fit.data.dataset import is_dataset, rows_of, seeded
from mlx_fit.data.fetch import fetcher, stream_fetcher
from mlx_fit.data.options import check_exclusions, check_stream
from mlx_fit.data.order import ORDER_VERSION, order
from mlx_fit.errors import ConfigurationError, DataError, ResumeError

__all__ = ["DataLoader"]


@dataclass
class _Position:
    """How far one pass over the data has come."""

    epoch: int
    samples_consumed: int


class DataLoader:
    """Batches of NumPy arrays from a dataset, with PyTorch's arguments and an order one can resume.

    The order of an epoch is a function of the seed and the epoch alone, so the position is a few
    integers (:meth:`state_dict`), and going to any batch costs the same. ``iter(loader)`` starts
    the epoch after the last one that was finished; an iterator that was left early does not count,
    and the same epoch starts again from its first batch.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``; arrays, or tuples and dicts of
            arrays, as for :class:`ArrayDataset`; or an iterable of rows, read in its own order.
            Whole batches are read where the dataset can: arrays by one index operation, a
            dataset with ``__getitems__(indices)`` by one call.
        batch_size: rows per batch.
        shuffle: visit the rows in a new random order each epoch, given by ``seed``.
        sampler: iterable of row indices for one epoch, instead of ``shuffle``. If it has
            ``set_epoch``, that is called. To be resumable it must repeat an epoch's indices.
        batch_sampler: iterable of lists of row indices, instead of ``batch_size``, ``shuffle``,
            ``sampler`` and ``drop_last``.
        collate_fn: makes a batch of a list of rows. Default: stack them, float64 as float32.
        drop_last: leave out a last batch with fewer rows.
        seed: for the order and the draws of :class:`Map`. None draws one, which the state keeps.

    Raises:
        ConfigurationError: arguments that exclude each other, or no batch would be left.
        DataError: arrays whose lengths differ.

    Example:
        >>> import numpy as np
        >>> from mlx_fit.data import DataLoader
        >>> x, y = np.zeros((10, 3)), np.arange(10)
        >>> loader = DataLoader((x, y), batch_size=4, shuffle=True, seed=0)
        >>> [x.shape for x, y in loader]
        [(4, 3), (4, 3), (2, 3)]
        >>> loader.state_dict()["epoch"]
        1
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        check_exclusions(
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            batch_sampler=batch_sampler,
            drop_last=drop_last,
        )
        self.dataset = rows_of(dataset)
        self.batch_size = (
            None if batch_sampler is not None else natural("batch_size", batch_size, 1)
        )
        self.shuffle = boolean("shuffle", shuffle)
        self.sampler = sampler
        self.batch_sampler = batch_sampler
        self.collate_fn = collate_fn
        self.drop_last = boolean("drop_last", drop_last)
        self.seed = int.from_bytes(os.urandom(4), "big") if seed is None else natural("seed", seed)
        self._draws_seed = seed is None
        self._is_stream = not is_dataset(self.dataset)
        self._num_rows = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        self._position = _Position(epoch=0, samples_consumed=0)
        self._is_loaded = False  # the position is where to start, not where an iterator has come
        self._is_spent = False  # the dataset is an iterator, and was read
        if self._is_stream:
            check_stream(
                self.dataset, shuffle=shuffle, sampler=sampler, batch_sampler=batch_sampler
            )
        num_samples = self._num_samples()
        if drop_last and num_samples is not None and num_samples < batch_size:
            raise ConfigurationError(
                f"{num_samples} samples, batch_size {batch_size}, drop_last: 0 batches. Use a "
                "smaller batch_size or drop_last=False."
            )

    def __len__(self) -> int:
        """Batches of one whole epoch.

        Raises:
            TypeError: the dataset, or the sampler, has no length.
        """
        if self.batch_size is None:
            return len(self.batch_sampler)  # type: ignore[arg-type]
        num_samples = self._num_samples()
        if num_samples is None:
            unsized = self.dataset if self.sampler is None else self.sampler
            raise TypeError(
                f"this DataLoader has no len(), because its {type(unsized).__name__} has none. "
                "Where a number of batches is needed, give steps_per_epoch."
            )
        whole, rest = divmod(num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or what a loaded state left of it."""
        if self._is_spent:
            raise DataError(
                f"The dataset of this DataLoader, a {type(self.dataset).__name__}, is an iterator, "
                "which can be read once. Pass an object whose __iter__ starts again."
            )
        self._is_spent = self._is_stream and hasattr(self.dataset, "__next__")
        start = self._position.samples_consumed if self._is_loaded else 0
        position = _Position(self._position.epoch, start)
        self._position, self._is_loaded = position, False
        return self._read(position)

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter(loader)`` be epoch ``epoch``, counted from 0.

        Setting the epoch where the loader is anyway keeps a loaded position.
        """
        if epoch != self._position.epoch:
            self._position = _Position(natural("epoch", epoch), 0)

    def state_dict(self) -> dict[str, Any]:
        """The position as a small dict for JSON: what was handed out, of which epoch and set-up."""
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "epoch": self._position.epoch,
            "samples_consumed": self._position.samples_consumed,
            "n": self._num_rows,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next ``iter(loader)`` yields the batches that were left.

        If none were left but the epoch's iterator had not ended, that is an empty remainder. A
        loader made with ``seed=None`` takes the saved seed.

        Raises:
            ResumeError: the state belongs to another set-up, or is no state of a DataLoader.
        """
        current = self.state_dict()
        if not isinstance(state, dict) or state.keys() != current.keys():
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ResumeError(f"Not a DataLoader state: expected {sorted(current)}, found {found}.")
        free = {"epoch", "samples_consumed"} | ({"seed"} if self._draws_seed else set())
        for field in current:
            if field not in free and state[field] != current[field]:
                raise ResumeError(
                    f"The state was saved with {field}={state[field]!r}, but this DataLoader has "
                    f"{field}={current[field]!r}: the remaining batches would not be those that "
                    "were left. Use the same data and arguments."
                )
        self.seed = state["seed"]
        self._position = _Position(state["epoch"], state["samples_consumed"])
        self._is_loaded = True

    def _num_samples(self) -> int | None:
        """Samples of an epoch, before ``drop_last``."""
        if self.sampler is None:
            return self._num_rows
        return len(self.sampler) if isinstance(self.sampler, Sized) else None

    def _read(self, position: _Position) -> Iterator[Any]:
        epoch = position.epoch
        if self._is_stream:
            fetch = stream_fetcher(self.batch_size or 1, self.collate_fn)
        else:
            fetch = fetcher(seeded(self.dataset, self.seed, epoch), self.collate_fn)
        first, batches = self._batches(epoch, position.samples_consumed)
        for number, rows in enumerate(batches, first):
            batch = fetch(rows, epoch, number)
            position.samples_consumed += len(rows)
            yield batch
        # An old iterator that ends late must not move a loader that has gone elsewhere.
        if epoch == self._position.epoch and not self._is_loaded:
            self._position = _Position(epoch + 1, 0)

    def _batches(self, epoch: int, start: int) -> tuple[int, Iterator[Any]]:
        """The number of the first batch, and from it on each one's row indices (a stream: rows)."""
        size, drop_last = self.batch_size, self.drop_last
        if size is None:
            return from_batch_sampler(self.batch_sampler or (), epoch, start)
        first = start // size
        if self._is_stream:
            return first, from_stream(self.dataset, size, drop_last, epoch, start)
        if self.sampler is not None:
            return first, from_sampler(self.sampler, size, drop_last, epoch, start)
        num_rows = self._num_rows or 0
        rows = order(self.seed, epoch, num_rows) if self.shuffle else range(num_rows)
        return first, from_order(rows, size, drop_last, start)
