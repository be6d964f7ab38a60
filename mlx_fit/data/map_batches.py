"""MapBatches: a transform of whole batches.

Imports layer 2: data.arrays, data.dataset, data.fetch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_fit.data.arrays import flatten, skeleton, unflatten
from mlx_fit.data.dataset import Transformed, seeded
from mlx_fit.data.fetch import fetcher

__all__ = ["MapBatches"]


class MapBatches(Transformed):
    """``f(batch, rng)`` for each batch of ``dataset``: vectorised preprocessing, mixup and so on.

    ``rng`` is made from the seed and the epoch of the :class:`DataLoader` and from which rows the
    batch has, so draws are repeated by a resumed run and do not depend on the number of workers.
    Transforms of single rows are :class:`Map`'s, and the two can be nested.

    Args:
        dataset: a dataset, or arrays as for :class:`ArrayDataset`.
        f: called with a batch of NumPy arrays of shape ``(rows, ...)`` and a
            ``numpy.random.Generator``; returns arrays with the same number of rows.
        seed, epoch: what is drawn when rows are read without a loader.

    Example:
        >>> import numpy as np
        >>> from mlx_fit.data import DataLoader, MapBatches
        >>> data = MapBatches((np.ones((6, 2)), np.arange(6)), lambda b, rng: (b[0] * 2, b[1]))
        >>> x, y = next(iter(DataLoader(data, batch_size=3)))
        >>> x.tolist(), y.tolist()
        ([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]], [0, 1, 2])
    """

    def __init__(
        self,
        dataset: Any,
        f: Callable[[Any, np.random.Generator], Any],
        *,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(dataset, f, seed=seed, epoch=epoch)
        self._fetch = fetcher(seeded(self.dataset, seed, epoch), None)

    def __getitem__(self, index: int) -> Any:
        """Row ``index``, as a batch of itself."""
        batch = self.__getitems__([range(len(self))[index]])
        return unflatten(skeleton(batch), (leaf[0] for _, leaf in flatten(batch)))

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """The batch of the rows at ``indices``."""
        wanted = np.asarray(indices, dtype=np.int64)
        batch = self._fetch(wanted, self.epoch, 0)
        # A checksum of the rows: seeding with all of them costs more than most batches.
        entropy = [self.seed, self.epoch, zlib.crc32(wanted.tobytes()), len(wanted)]
        return self.f(batch, np.random.default_rng(entropy))
