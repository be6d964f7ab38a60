"""BucketBatches: rows of similar length together. Imports layer 2: text.batches, text.planning."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_fit.batch import TextBatch
from mlx_fit.checks import boolean, natural
from mlx_fit.data.order import order
from mlx_fit.text.batches import TokenBatches, text_batch
from mlx_fit.text.planning import Grid, bucketed, choose_grid

__all__ = ["BucketBatches"]


class BucketBatches(TokenBatches):
    """Batches of rows of similar length, padded on the right to one of a few widths.

    The widths are those that pad the data set's rows least. Each epoch visits the rows in a new
    order and queues them by width; a full queue is a batch. The widest batch comes first, and with
    it the one of most positions, so that memory trouble shows at once; the rest come in random
    order. With ``iter``, ``set_epoch`` and
    state as :class:`~mlx_fit.data.DataLoader` has them.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, whose items are ``(tokens, mask)``, such as
            :class:`TextDataset`.
        batch_size: rows of a batch.
        max_shapes: (rows, width) pairs of all batches of all epochs at most, because MLX compiles a
            step for each. A short batch counts, too. With 1, it is filled up with empty rows.
        shuffle: visit the rows in a new random order each epoch, instead of their own; then every
            epoch has the same batches.
        seed: of the order. None draws one, which the state keeps.

    Attributes:
        widths: the padded lengths, ascending.

    Raises:
        ConfigurationError: an argument is wrong.
        DataError: the data set is empty, or an item is not ``(tokens, mask)``.

    Example:
        >>> from mlx_fit.text import BucketBatches
        >>> rows = [([1] * n, [1] * n) for n in (3, 9, 4, 8)]
        >>> loader = BucketBatches(rows, batch_size=2, seed=0)
        >>> [batch.tokens.shape for batch in loader]
        [(2, 9), (2, 4)]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        max_shapes: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, seed)
        self.max_shapes = natural("max_shapes", max_shapes, 1)
        self.shuffle = boolean("shuffle", shuffle)
        self._grid = choose_grid(np.maximum(self.lengths, 1), self.batch_size, self.max_shapes)
        self.widths = self._grid.widths
        # Two shapes cannot be one in any other way.
        self._fills = self.max_shapes == 1 and len(self.lengths) > self.batch_size

    def _plan(self, epoch: int) -> list[Any]:
        seed = self.seed if self.shuffle else None
        return plan_by_length(self.lengths, self._grid, self.batch_size, seed, epoch)

    def _batch(self, planned: Any) -> TextBatch:
        rows, width = np.asarray(planned[0]), planned[1]
        pieces = np.stack([rows, np.zeros_like(rows), self.lengths[rows]], axis=1)
        shape = (self.batch_size if self._fills else len(rows), width)
        return text_batch(self._rows, pieces, np.arange(len(rows)), shape)

    def _set_up(self) -> dict[str, Any]:
        return {"max_shapes": self.max_shapes, "shuffle": self.shuffle}


def plan_by_length(
    lengths: np.ndarray, grid: Grid, batch_size: int, seed: int | None, epoch: int
) -> list[tuple[Any, int]]:
    """Rows and width of each batch of an epoch, the widest and the largest first.

    Args:
        lengths: of all rows.
        grid: the widths that batches may have.
        batch_size: rows of a batch.
        seed: of the order; None: the rows' own order.
        epoch: counted from 0.
    """
    count = len(lengths)
    visited = np.arange(count) if seed is None else order(seed, epoch, count)[:]
    batches = bucketed(lengths, visited, grid, batch_size)
    planned = list(zip(batches.rows, batches.widths, strict=True))
    if seed is not None:
        # Another stream than that of the rows, from the same seed and epoch.
        planned = [planned[i] for i in order(seed, -1 - epoch, len(planned))[:]]
    widest = max(planned, key=lambda batch: batch[1])
    largest = max(planned, key=lambda batch: (batch[1] * len(batch[0]), batch[1]))
    first = [widest] if widest is largest else [widest, largest]
    return first + [batch for batch in planned if batch is not widest and batch is not largest]
