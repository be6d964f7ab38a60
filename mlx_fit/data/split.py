"""Data for several ranks: each batch is split, or each rank brings its own.

Imports layer 2: communicator, data.loader, data.shares, data.sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.batch import is_empty
from mlx_fit.communicator import check_same, gather, of_first
from mlx_fit.data.loader import DataLoader
from mlx_fit.data.shares import Splittable, share
from mlx_fit.data.sources import BatchSource, RowSource, Source
from mlx_fit.errors import ConfigurationError
from mlx_fit.protocols import Communicator

__all__ = ["split_over"]

_END = object()


def split_over(source: Source, ranks: Communicator, joins: bool = False) -> Source:
    """A source that gives each rank its own part of the data.

    Arrays, datasets, loaders of this package are split: each rank gets its share of every batch.
    Anything else gives each rank what it gives it, which must be that rank's part already.

    Args:
        source: of the whole data, or of this rank's part.
        ranks: of one, the source stays as it is.
        joins: let ranks whose own data has ended go on without samples, or end all with the first.

    Raises:
        ConfigurationError: the ranks have different data, or the data is split already.
    """
    if ranks.size == 1:
        return source
    if isinstance(source, RowSource):
        return SplitSource(source, ranks)
    if isinstance(source, BatchSource) and isinstance(source.iterable, DataLoader | Splittable):
        return SplitSource(source, ranks)
    if ranks.balances:
        raise ConfigurationError(
            f"balance=True decides how many rows of a batch each rank reads, and {source.name} "
            "gives each rank batches of its own. Give arrays, a dataset or a DataLoader, or leave "
            "balance out."
        )
    return JoinedSource(source, ranks) if joins else source


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


class JoinedSource(Source):
    """Each rank's own batches, in step: all ranks draw as many, whoever has how many.

    ``uneven="join"``: a rank whose data has ended gets None until all have ended. ``"stop"``: all
    end with the first; what the others have drawn by then is left out.

    Args:
        source: of this rank's part.
        ranks: who draws together.
    """

    def __init__(self, source: Source, ranks: Communicator) -> None:
        self.name = source.name
        self.num_rows = None
        self.batch_size = None
        self.one_shot = source.one_shot
        self._source = source
        self._ranks = ranks
        counts = gather(ranks, source.num_batches)
        known = [count for count in counts if count is not None]
        ends = max if ranks.uneven == "join" else min
        self.num_batches = ends(known) if len(known) == ranks.size else None

    def batches(self, epoch: int) -> Iterator[Any]:
        batches, ranks = self._source.batches(epoch), self._ranks
        while True:
            batch = next(batches, _END)
            has_batch = batch is not _END
            (total,) = ranks.sum([mx.array(float(has_batch))])
            count = round(float(np.array(total)))
            if count == 0 or (count < ranks.size and ranks.uneven == "stop"):
                return
            yield None if not has_batch or is_empty(batch) else batch

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any] | None:
        return self._source.position(num_batches, untaken)

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        own = self._source.num_batches
        self._source.restore(position, num_batches if own is None else min(own, num_batches))
