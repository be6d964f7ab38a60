"""Samplers: which rows an epoch visits. Imports layer 2: data.arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlx_fit.checks import boolean, natural
from mlx_fit.data.arrays import to_numpy
from mlx_fit.data.order import order, uniform
from mlx_fit.errors import ConfigurationError

__all__ = ["RowGroupSampler", "StratifiedSampler", "WeightedRandomSampler"]


class WeightedRandomSampler:
    """Draws rows with probabilities in proportion to ``weights``, with PyTorch's arguments.

    What is drawn is a function of the seed and the epoch alone, so a run can go on exactly.

    Args:
        weights: one number >= 0 per row, of shape ``(rows,)``. They need not add up to 1.
        num_samples: draws of an epoch. Default: as many as there are rows.
        replacement: a row may be drawn again. If not, rows are drawn one after the other from
            those that are left (Efraimidis and Spirakis, "Weighted random sampling with a
            reservoir", 2006: the largest ``u ** (1 / weight)`` come first).
        seed: for the draws.

    Raises:
        ConfigurationError: weights that are no such numbers, or too few rows to draw from.

    Example:
        >>> from mlx_fit.data import DataLoader, WeightedRandomSampler
        >>> sampler = WeightedRandomSampler([0.0, 1.0, 0.0, 1.0], num_samples=100)
        >>> loader = DataLoader(range(4), batch_size=10, sampler=sampler)
        >>> sorted({row for batch in loader for row in batch.tolist()})
        [1, 3]
    """

    def __init__(
        self,
        weights: Any,
        num_samples: int | None = None,
        replacement: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        self.weights = _weights(weights)
        self.num_samples = (
            len(self.weights) if num_samples is None else natural("num_samples", num_samples, 1)
        )
        self.replacement = boolean("replacement", replacement)
        self.seed = natural("seed", seed)
        self._epoch = 0
        num_drawable = int(np.count_nonzero(self.weights))
        if not replacement and self.num_samples > num_drawable:
            raise ConfigurationError(
                f"num_samples={self.num_samples} without replacement, but only {num_drawable} of "
                f"{len(self.weights)} weights are above 0. Use fewer samples or replacement=True."
            )

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """The indices of an epoch."""
        return iter(self._draw().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Draw for epoch ``epoch`` from now on; a DataLoader calls this."""
        self._epoch = natural("epoch", epoch)

    def _draw(self) -> np.ndarray:
        if self.replacement:
            ends = np.cumsum(self.weights)
            drawn = uniform(self.seed, self._epoch, self.num_samples) * ends[-1]
            # Rounding may reach the end itself; the last row that can be drawn takes it.
            last = np.flatnonzero(self.weights)[-1]
            return np.minimum(np.searchsorted(ends, drawn, side="right"), last)
        rows = np.flatnonzero(self.weights)
        # 1 - u is in (0, 1], so the logarithm is finite.
        keys = np.log1p(-uniform(self.seed, self._epoch, len(rows))) / self.weights[rows]
        return rows[np.argsort(-keys, kind="stable")[: self.num_samples]]


class StratifiedSampler:
    """Visits each row once an epoch, with the classes spread evenly over it.

    Every stretch of the epoch, and so every batch, has each class in proportion to its share, to
    within two rows a class. Within its class the order is random, a function of the seed and the
    epoch alone.

    Args:
        labels: the class of each row: integers, strings, or anything that can be sorted, of shape
            ``(rows,)``.
        seed: for the order.

    Raises:
        ConfigurationError: ``labels`` are not one per row, or there are none.

    Example:
        >>> from mlx_fit.data import DataLoader, StratifiedSampler
        >>> labels = [0] * 30 + [1] * 10
        >>> loader = DataLoader(labels, batch_size=8, sampler=StratifiedSampler(labels))
        >>> [int(batch.sum()) for batch in loader]
        [2, 2, 2, 2, 2]
    """

    def __init__(self, labels: Any, *, seed: int = 0) -> None:
        classes = to_numpy(labels)
        if classes.ndim != 1 or not len(classes):
            raise ConfigurationError(
                f"labels have shape {classes.shape}; expected one class per row, of shape (rows,)."
            )
        _, inverse = np.unique(classes, return_inverse=True)
        self.seed = natural("seed", seed)
        self._epoch = 0
        # The rows of each class.
        self._rows = [np.flatnonzero(inverse == label) for label in range(inverse.max() + 1)]

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def __iter__(self) -> Iterator[int]:
        """The indices of an epoch."""
        return iter(self._order().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Order the rows of epoch ``epoch`` from now on; a DataLoader calls this."""
        self._epoch = natural("epoch", epoch)

    def _order(self) -> np.ndarray:
        shuffled = order(self.seed, self._epoch, len(self))[:]
        rank = np.empty(len(self), np.int64)
        rank[shuffled] = np.arange(len(self))
        offsets = uniform(self.seed, self._epoch, len(self._rows))
        rows, times = [], []
        for members, offset in zip(self._rows, offsets, strict=True):
            rows.append(members[np.argsort(rank[members])])
            # Member i of n comes at (i + offset) / n of the epoch.
            times.append((np.arange(len(members)) + offset) / len(members))
        return np.concatenate(rows)[np.argsort(np.concatenate(times), kind="stable")]


class RowGroupSampler:
    """Visits each row once an epoch, in random order among a few row groups at a time.

    For :func:`open_table` of Parquet, where a row is read by decoding its whole group: groups are
    visited in random order, and the rows of ``num_mixed`` of them are shuffled together. The order
    is a function of the seed and the epoch alone, so a run can go on exactly.

    Args:
        group_sizes: rows of each group, ``table.group_sizes``.
        num_mixed: groups whose rows are mixed; at most the ``num_kept`` of :func:`open_table`, or
            groups are decoded again and again.
        seed: for the order.

    Raises:
        ConfigurationError: sizes that are no whole numbers, or no row at all.

    Example:
        >>> from mlx_fit.data import DataLoader, RowGroupSampler
        >>> loader = DataLoader(range(9), batch_size=3, sampler=RowGroupSampler([3, 3, 3], 1))
        >>> sorted(sorted(batch.tolist()) for batch in loader)
        [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    """

    def __init__(self, group_sizes: Sequence[int], num_mixed: int = 4, *, seed: int = 0) -> None:
        self.group_sizes = [natural("group_sizes", size) for size in group_sizes]
        self.num_mixed = natural("num_mixed", num_mixed, 1)
        self.seed = natural("seed", seed)
        self._epoch = 0
        if not sum(self.group_sizes):
            raise ConfigurationError("group_sizes has no rows; expected those of a table.")

    def __len__(self) -> int:
        return sum(self.group_sizes)

    def __iter__(self) -> Iterator[int]:
        """The indices of an epoch."""
        epoch = self._epoch  # an epoch that has begun stays as it is
        sizes = np.asarray(self.group_sizes, np.int64)
        starts = np.cumsum(sizes) - sizes
        groups = order(self.seed, epoch, len(sizes))[:]
        for first in range(0, len(groups), self.num_mixed):
            mixed = groups[first : first + self.num_mixed]
            rows = np.concatenate([np.arange(starts[g], starts[g] + sizes[g]) for g in mixed])
            # A seed of its own for each stretch; order() takes integers of any size.
            stretch = (self.seed << 64) + (epoch << 32) + first + 1
            yield from rows[order(stretch, epoch, len(rows))[:]].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Order the rows of epoch ``epoch`` from now on; a DataLoader calls this."""
        self._epoch = natural("epoch", epoch)


def _weights(weights: Any) -> np.ndarray:
    try:
        array = to_numpy(weights).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"weights cannot be made numbers: {error}") from error
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any() or not array.sum() > 0:
        raise ConfigurationError(
            f"weights of shape {array.shape}: expected one finite number >= 0 per row, of shape "
            "(rows,), and at least one above 0."
        )
    return array
