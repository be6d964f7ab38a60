"""DataLoader: batches of a dataset, in an order that can be resumed.

Imports layer 2: data.batching, data.dataset, data.options, data.position, data.reader, data.recipe,
data.shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from copy import copy
from dataclasses import replace
from itertools import repeat
from typing import Any

from mlx_fit.checks import boolean, natural
from mlx_fit.data.batching import (
    from_batch_sampler,
    from_order,
    from_sampler,
    warn_of_discarding,
)
from mlx_fit.data.dataset import is_dataset, rows_of
from mlx_fit.data.options import (
    check_exclusions,
    check_kinds,
    check_stream,
    seed_of,
    worker_options,
)
from mlx_fit.data.order import ORDER_VERSION, order
from mlx_fit.data.position import Place, Position, check_state
from mlx_fit.data.reader import Reader
from mlx_fit.data.recipe import Recipe
from mlx_fit.data.shares import Rates, check_replica
from mlx_fit.errors import ConfigurationError, DataError, ResumeError

__all__ = ["DataLoader"]


class DataLoader:
    """Batches of NumPy arrays from a dataset, with PyTorch's arguments and an order one can resume.

    The order of an epoch is a function of the seed and the epoch alone, so the position is a few
    integers (:meth:`state_dict`), and going to any batch costs the same. ``iter(loader)`` starts
    the epoch after the last one that was finished; an iterator that was left early does not count,
    and the same epoch starts again from its first batch.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``; arrays, or tuples and dicts of
            arrays, as for :class:`ArrayDataset`; or an iterable of rows (a stream), read in its own
            order. To resume, a stream's rows are read up to the position, with a warning, unless it
            has ``state_dict`` and ``load_state_dict`` (JSON), which :meth:`state_dict` then holds.
            Whole batches are read where the dataset can: arrays by one index operation, a
            dataset with ``__getitems__(indices)`` by one call.
        batch_size: rows per batch.
        shuffle: visit the rows in a new random order each epoch, given by ``seed``.
        sampler: iterable of row indices for one epoch, instead of ``shuffle``. If it has
            ``set_epoch``, that is called. To be resumable it must repeat an epoch's indices.
        batch_sampler: iterable of lists of row indices, instead of ``batch_size``, ``shuffle``,
            ``sampler`` and ``drop_last``.
        num_workers: processes that make batches, for Python code that is slower than training.
            They are started (spawned) with each pass, so a script must do its work under
            ``if __name__ == "__main__":``, and dataset and functions must be picklable. They return
            NumPy, through shared memory. The batches, their order and the draws of :class:`Map` are
            the same for any number. A stream cannot be divided: one process reads it. With 0,
            batches that take long (over half a millisecond) are made ahead in a thread, others in
            the caller's.
        collate_fn: makes a batch of a list of rows. Default: stack them, float64 as float32.
        drop_last: leave out a last batch with fewer rows.
        timeout: seconds to wait for a batch before :class:`WorkerError`; 0 waits for ever.
        worker_init_fn: called with its number in each process. NumPy's and Python's global
            generators are seeded before it, from the seed, the epoch and the number.
        generator: gives the seed: a ``torch.Generator`` its initial seed, a
            ``numpy.random.Generator`` a draw.
        prefetch_factor: batches made ahead, by each process or by the thread. 0 uses no thread
            (for datasets that must stay in the caller's, and draws of MLX's random numbers).
        persistent_workers: keep the processes for the next pass.
        pin_memory: accepted for PyTorch's sake, and without meaning: MLX's memory is unified.
        seed: for the order and the draws of :class:`Map`. None draws one, which the state keeps.
        num_replicas, rank: for a hand-written loop on several ranks: yield of each batch the share
            of rank ``rank`` (as many rows for all, give or take one; ``batch_size`` stays that of
            the whole batch). The batches are the same for any number of ranks, and so is the state.
            All ranks need the same ``seed``. A :class:`DistributedTrainer` splits by itself.

    Attributes:
        draws_seed: whether no seed was given.
        wait_seconds: what iterators have waited for batches so far, in all passes.

    Raises:
        ConfigurationError: arguments that exclude each other or would have no effect, or no batch
            would be left.
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
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], Any] | None = None,
        generator: Any = None,
        prefetch_factor: int | None = 2,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        seed: int | None = None,
        *,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        check_exclusions(batch_size, shuffle, sampler, batch_sampler, drop_last)
        check_kinds(sampler, batch_sampler, collate_fn)
        self.dataset = rows_of(dataset)
        self.batch_size = (
            None if batch_sampler is not None else natural("batch_size", batch_size, 1)
        )
        self.shuffle = boolean("shuffle", shuffle)
        self.sampler = sampler
        self.batch_sampler = batch_sampler
        self.collate_fn = collate_fn
        self.drop_last = boolean("drop_last", drop_last)
        self.num_workers = natural("num_workers", num_workers)
        self.persistent_workers = persistent_workers
        self.pin_memory = boolean("pin_memory", pin_memory)
        self.seed = seed_of(seed, generator)
        self.draws_seed = seed is None and generator is None
        self._num_rows = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        self._place = Place(Position(epoch=0, samples_consumed=0))
        is_stream = not is_dataset(self.dataset)
        if is_stream:
            check_stream(self.dataset, shuffle, sampler, batch_sampler)
        self.num_replicas, self.rank = check_replica(num_replicas, rank)
        whole = Recipe(self.dataset, collate_fn, self.batch_size, self.drop_last, is_stream)
        self._recipe = replace(whole, num_replicas=self.num_replicas, rank=self.rank)
        self._options = worker_options(
            num_workers, timeout, worker_init_fn, prefetch_factor, persistent_workers
        )
        self._reader = Reader(self._recipe, self._options)
        self._shares: dict[tuple[int, int], tuple[Rates, Reader]] = {}
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
        if self._place.is_spent:
            raise DataError(
                f"The dataset of this DataLoader, a {type(self.dataset).__name__}, is an iterator, "
                "which can be read once. Pass an object whose __iter__ starts again."
            )
        self._place.is_spent = self._recipe.is_one_shot
        position = Position(self._place.position.epoch, 0)
        if self._place.is_loaded:
            position = replace(self._place.position)
        self._place.position, self._place.is_loaded = position, False
        first, batches = self._batches(position)
        return self._reader.read(position, self.seed, enumerate(batches, first), self._finish)

    def shard(self, num_replicas: int, rank: int, rates: Rates = None) -> DataLoader:
        """This loader for one rank of several: it yields that rank's share of each batch.

        Both are in one place in the data: what one has read, the other has read as well. With
        ``rates``, rows a second of each rank, the faster ones get larger shares.
        """
        num_replicas, rank = check_replica(num_replicas, rank)
        loader = copy(self)
        loader.num_replicas, loader.rank = num_replicas, rank
        recipe = replace(self._recipe, num_replicas=num_replicas, rank=rank, rates=rates)
        # One reader is kept, with its processes, until the shares become others.
        kept, reader = self._shares.get((num_replicas, rank), (None, None))
        if reader is None or kept != rates:
            reader = Reader(recipe, self._options)
        self._shares[num_replicas, rank] = rates, reader
        loader._recipe, loader._reader = recipe, reader
        return loader

    @property
    def wait_seconds(self) -> float:
        """Seconds that iterators of this loader have spent on waiting for batches so far."""
        return self._reader.wait_seconds

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter(loader)`` be epoch ``epoch``, counted from 0.

        Setting the epoch where the loader is anyway keeps a loaded position.
        """
        if epoch != self._place.position.epoch:
            self._place.position = Position(natural("epoch", epoch), 0)

    def state_dict(self) -> dict[str, Any]:
        """The position as a small dict for JSON: what was handed out, of which epoch and set-up."""
        state = {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "epoch": self._place.position.epoch,
            "samples_consumed": self._place.position.samples_consumed,
            "n": self._num_rows,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }
        if self._recipe.is_stateful:
            state["dataset_state"] = self._place.position.dataset_state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next ``iter(loader)`` yields the batches that were left.

        If none were left but the epoch's iterator had not ended, that is an empty remainder. A
        loader made with ``seed=None`` takes the saved seed.

        Raises:
            ResumeError: the state belongs to another set-up, or is no state of a DataLoader.
        """
        check_state(state, self.state_dict(), self.draws_seed)
        self._check_consumed(state["samples_consumed"])
        self.seed = state["seed"]
        self._place.position = Position(
            state["epoch"], state["samples_consumed"], state.get("dataset_state")
        )
        self._place.is_loaded = True

    def _check_consumed(self, consumed: int) -> None:
        """That there are so many samples. A fit may go on with batches of another size anywhere."""
        if self.sampler is not None or self.batch_size is None or self._num_rows is None:
            return  # samplers may repeat rows
        if consumed > self._num_rows:
            raise ResumeError(
                f"samples_consumed={consumed} in a DataLoader state is no position: the data has "
                f"{self._num_rows} samples."
            )

    def _num_samples(self) -> int | None:
        """Samples of an epoch, before ``drop_last``."""
        if self.sampler is None:
            return self._num_rows
        return len(self.sampler) if isinstance(self.sampler, Sized) else None

    def _finish(self, position: Position) -> None:
        # An old iterator that ends late must not move a loader that has gone elsewhere.
        if position.epoch == self._place.position.epoch and not self._place.is_loaded:
            self._place.position = Position(position.epoch + 1, 0)

    def _batches(self, position: Position) -> tuple[int, Iterator[Any]]:
        """The number of the first batch, and from it on each one's row indices (a stream: rows)."""
        epoch, start = position.epoch, position.samples_consumed
        size, drop_last = self.batch_size, self.drop_last
        if size is None:
            return from_batch_sampler(self.batch_sampler or (), epoch, start)
        first = start // size
        if self._recipe.is_stream:
            state = position.dataset_state
            if start and state is None:
                warn_of_discarding(self.dataset, start)
            if self.num_workers:
                return first, repeat(None)  # the process reads the stream
            return first, self._recipe.stream(epoch, start, state)
        if self.sampler is not None:
            return first, from_sampler(self.sampler, size, drop_last, epoch, start)
        num_rows = self._num_rows or 0
        rows = order(self.seed, epoch, num_rows) if self.shuffle else range(num_rows)
        return first, from_order(rows, size, drop_last, start)
