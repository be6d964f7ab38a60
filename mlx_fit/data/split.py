"""Data for several ranks: each batch is split, or each rank brings its own.

Imports layer 2: communicator, data.loader, data.shares, data.sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.batch import is_empty
from mlx_fit.communicator import check_same, gather, of_first
from mlx_fit.data.loader import DataLoader
from mlx_fit.data.shares import Splittable, share
from mlx_fit.data.sources import BatchSource, RowSource, Source, skipping
from mlx_fit.errors import ConfigurationError, DataError, MlxFitError
from mlx_fit.protocols import Communicator

__all__ = ["EndlessSource", "EvaluatedSource", "JoinedSource", "OwnSource", "split_over"]

_END = object()
_WHOLE = (
    "all ranks need the same. The trainer splits arrays, datasets and DataLoaders itself; give "
    "what is a rank's own part as a list of its batches (an empty one where it has none)."
)


def split_over(source: Source, ranks: Communicator, own: type[OwnSource]) -> Source:
    """A source that gives each rank its own part of the data.

    Arrays, datasets, loaders of this package are split: each rank gets its share of every batch.
    Anything else gives each rank what it gives it, which must be that rank's part already; a rank
    may have nothing, as long as another one has something.

    Args:
        source: of the whole data, or of this rank's part; an empty one among several ranks too.
        ranks: of one, the source stays as it is.
        own: how a rank's own batches keep in step with those of the others.

    Raises:
        ConfigurationError: the ranks have different data, or the data is split already.
        DataError: no rank has a batch.
    """
    if ranks.size == 1:
        return source
    is_split = isinstance(source, RowSource) or (
        isinstance(source, BatchSource) and isinstance(source.iterable, DataLoader | Splittable)
    )
    found = gather(ranks, [is_split, source.num_batches, source.one_shot], "kinds of data")
    if any(other != is_split for other, *_ in found):
        whole, parts = (
            [rank for rank, (k, *_) in enumerate(found) if k is v] for v in (True, False)
        )
        raise _known(
            ranks,
            ConfigurationError(
                f"{source.name} is arrays, a dataset or a DataLoader, which the trainer splits, on "
                f"rank {_listed(whole)}, and batches of its own on rank {_listed(parts)}. Give all "
                "ranks the same arrays, dataset or DataLoader, or each its own batches (an empty "
                "list where it has none)."
            ),
        )
    if all(count == 0 for _, count, _ in found):
        raise _known(ranks, _empty(source.name, ranks))
    if is_split:
        assert isinstance(source, RowSource | BatchSource)
        return SplitSource(source, ranks)
    if ranks.balances:
        raise ConfigurationError(
            f"balance=True decides how many rows of a batch each rank reads, and {source.name} "
            "gives each rank batches of its own. Give arrays, a dataset or a DataLoader, or leave "
            "balance out."
        )
    if own is EndlessSource and any(one_shot for *_, one_shot in found):
        own = JoinedSource  # an iterator does not start again
    return own(source, ranks, [count for _, count, _ in found])


def _known(ranks: Communicator, error: MlxFitError) -> MlxFitError:
    """An error that all ranks raise here."""
    ranks.knows(error)
    return error


def _empty(name: str, ranks: Communicator) -> DataError:
    return DataError(f"{name} is empty on all {ranks.size} ranks: not a single row or batch.")


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


class SplitSource(Source):
    """Every batch of a source, split over the ranks: the same batches for any number of them.

    Args:
        source: over arrays, a dataset or a loader of this package, the same on all ranks.
        ranks: who gets a part.
    """

    def __init__(self, source: RowSource | BatchSource, ranks: Communicator) -> None:
        self.name = source.name
        self.num_batches = source.num_batches
        self.num_rows = source.num_rows
        self.batch_size = source.batch_size
        self.one_shot = source.one_shot
        self._source = source
        self._ranks = ranks
        loader = source.iterable
        _check_unsplit(loader, source.name)
        self._seed_alike(loader)

    def _seed_alike(self, loader: Any) -> None:
        """All ranks read the same batches; a seed that was drawn is rank 0's."""
        state = loader.state_dict()
        seed = state.pop("seed", None)
        num_rows = {f"The number of rows of {self.name}": state.pop("n", None)}
        check_same(self._ranks, num_rows, _WHOLE)
        check_same(self._ranks, {f"{name} of {self.name}": v for name, v in state.items()})
        first = of_first(self._ranks, seed)
        if loader.draws_seed:
            loader.seed = first
        check_same(self._ranks, {f"seed of {self.name}": loader.seed})

    def batches(self, epoch: int) -> Iterator[Any]:
        size, rank, rates = self._ranks.size, self._ranks.rank, self._ranks.rates
        if isinstance(self._source.iterable, DataLoader):
            for batch in self._source.batches_of(epoch, size, rank, rates):
                yield None if is_empty(batch) else batch
            return
        for batch in self._source.batches(epoch):
            own = type(batch)(*(share(part, size, rank, rates) for part in batch))
            yield None if is_empty(own) else own

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any] | None:
        # Of an untaken batch this rank knows only its share.
        return None if untaken is not None else self._source.position(num_batches, None)

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        self._source.restore(position, num_batches)


def _check_unsplit(loader: Any, name: str) -> None:
    sampler = getattr(loader, "sampler", None)
    count = max(getattr(sampler, "num_replicas", 1), getattr(loader, "num_replicas", 1))
    if count > 1:
        raise ConfigurationError(
            f"{name} is split over {count} ranks already, and the trainer splits each batch of a "
            "DataLoader itself. Leave num_replicas, rank and a DistributedSampler out; batch_size "
            "is that of all ranks together."
        )


class OwnSource(Source):
    """Each rank's own batches, however many it has; None stands for a batch of no rows.

    Args:
        source: of this rank's part.
        ranks: who has the others.
        counts: how many batches a pass has on each of them, None where that is unknown.
    """

    def __init__(self, source: Source, ranks: Communicator, counts: list[int | None]) -> None:
        self.name = source.name
        self.num_batches = source.num_batches
        self.num_rows = None
        self.batch_size = None
        self.one_shot = source.one_shot
        self._source = source
        self._ranks = ranks
        self._asks = None in counts  # whether the first batches tell if there is any
        self._has_batches = source.num_batches != 0
        self._num_to_skip = 0

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any] | None:
        return self._source.position(num_batches, untaken)

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        """Skip what rank 0 had taken, as far as this rank has as much."""
        own = self._source.num_batches
        is_counted = own is not None or bool(position)
        self._num_to_skip = 0 if is_counted else num_batches
        taken = num_batches if own is None else self._in_pass(num_batches, own)
        self._source.restore(position, taken if is_counted else 0)

    def _in_pass(self, num_batches: int, own: int) -> int:
        """How many of its own batches this rank has taken, of a pass of so many of rank 0."""
        return min(own, num_batches)

    def _begun(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A pass; its first batch tells all ranks whether there is anything on any.

        Raises:
            DataError: there is nothing.
        """
        skipped, self._num_to_skip = self._num_to_skip, 0
        first = next(batches, _END)
        if self._asks:
            self._asks, self._has_batches = False, first is not _END
            self._check(self._count(self._has_batches))
        if first is _END:
            return iter(())
        return skipping(chain([first], batches), skipped, self.name, may_end=True)

    def _check(self, num_ranks: int) -> None:
        """Raise if so many ranks with batches are too few."""
        if num_ranks == 0:
            raise _known(self._ranks, _empty(self.name, self._ranks))

    def _count(self, value: bool) -> int:
        """On how many ranks something holds."""
        (total,) = self._ranks.sum([mx.array(float(value))])
        return round(float(np.array(total)))


class JoinedSource(OwnSource):
    """Each rank's own batches, in step: all ranks draw as many, whoever has how many.

    ``uneven="join"``: a rank whose data has ended gets None until all have ended. ``"stop"``: all
    end with the first; what the others have drawn by then is left out.
    """

    def __init__(self, source: Source, ranks: Communicator, counts: list[int | None]) -> None:
        super().__init__(source, ranks, counts)
        known = [count for count in counts if count is not None]
        ends = max if ranks.uneven == "join" else min
        self.num_batches = ends(known) if len(known) == ranks.size else None
        if not self._asks:
            self._check(len([count for count in counts if count]))

    def _check(self, num_ranks: int) -> None:
        super()._check(num_ranks)
        size = self._ranks.size
        if num_ranks < size and self._ranks.uneven == "stop":
            error = DataError(
                f"{self.name} is empty on {size - num_ranks} of {size} ranks, and with "
                "uneven='stop' all end with the first: there is no step. Give every rank a batch, "
                "or use uneven='join', with which ranks without rows take part in the steps of the "
                "others."
            )
            raise _known(self._ranks, error)

    def batches(self, epoch: int) -> Iterator[Any]:
        ranks = self._ranks
        batches = self._begun(self._source.batches(epoch))
        while True:
            batch = next(batches, _END)
            count = self._count(batch is not _END)
            if count == 0 or (count < ranks.size and ranks.uneven == "stop"):
                return
            yield None if batch is _END else _or_none(batch)


class EndlessSource(OwnSource):
    """Each rank's own batches, over and over, for epochs of so many steps.

    One pass that does not end, so that it has the same length on all ranks; a rank that has no
    batches gives None.
    """

    def __init__(self, source: Source, ranks: Communicator, counts: list[int | None]) -> None:
        super().__init__(source, ranks, counts)
        self.num_batches = None

    def batches(self, epoch: int) -> Iterator[Any]:
        yield from map(_or_none, self._begun(self._again(epoch)))
        while not self._has_batches:
            yield None

    def _again(self, epoch: int) -> Iterator[Any]:
        for number in count(epoch):
            batch = _END
            for batch in self._source.batches(number):
                yield batch
            if batch is _END:
                return

    def _in_pass(self, num_batches: int, own: int) -> int:
        return num_batches % own if own else 0


class EvaluatedSource(OwnSource):
    """Each rank's own batches, for evaluation and prediction: ranks need not draw as many."""

    def batches(self, epoch: int) -> Iterator[Any]:
        yield from map(_or_none, self._begun(self._source.batches(epoch)))
        if not self._has_batches:
            yield None


def _or_none(batch: Any) -> Any:
    return None if is_empty(batch) else batch
