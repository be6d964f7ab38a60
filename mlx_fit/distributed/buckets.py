"""Sums of many arrays over the ranks, joined to few messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import mlx.core as mx

from mlx_fit.distributed.compress import compressor_of
from mlx_fit.distributed.ring import Ring
from mlx_fit.distributed.sync import REDUCE_DTYPES, SyncPolicy

Named = dict[str, mx.array]


class Buckets:
    """Sums gradients over ranks in messages of about ``sync.bucket_mb``, one dtype each.

    Args:
        sync: sizes and dtype of the messages.

    Attributes:
        sync: as given.
        compressor: approximates the sums of gradients, or None.
    """

    def __init__(self, sync: SyncPolicy) -> None:
        self.sync = sync
        self.compressor = compressor_of(sync.compress)

    def sum(
        self, ring: Ring, gradients: Named, statistics: Named, weight: float
    ) -> tuple[Named, Named]:
        """Sums of both over the ranks, in float32; gradients may be sent in less.

        In less, shares of the mean are sent: sums could overflow float16, and what compression
        leaves for later has to weigh the same then.
        """
        if self.compressor is not None and weight:
            shares = {name: g / weight for name, g in gradients.items()}
            means = self.compressor.sum(ring, shares)
            sums = {name: mean * weight for name, mean in means.items()}
            return sums, self.summed(ring, statistics)
        if self.sync.reduce_dtype is None or not weight:
            summed = self.summed(ring, gradients | statistics)  # no name is in both
            return {k: summed[k] for k in gradients}, {k: summed[k] for k in statistics}
        half = REDUCE_DTYPES[self.sync.reduce_dtype]
        scaled = {name: (g / weight).astype(half) for name, g in gradients.items()}
        means = self.summed(ring, scaled)
        sums = {name: g.astype(mx.float32) * weight for name, g in means.items()}
        return sums, self.summed(ring, statistics)

    def summed(self, ring: Ring, arrays: Named) -> Named:
        """Sums of arrays over the ranks, each in its own dtype."""
        found: Named = {}
        for names in self._grouped(arrays):
            parts = [arrays[name] for name in names]
            if len(parts) == 1:
                (found[names[0]],) = ring.sum(parts, "gradients")
                continue
            # Held by nobody else, it is summed in place.
            (total,) = ring.sum([mx.concatenate([p.reshape(-1) for p in parts])], "gradients")
            ends = [*accumulate(part.size for part in parts)]
            pieces = mx.split(total, ends[:-1])
            for name, part, piece in zip(names, parts, pieces, strict=True):
                found[name] = piece.reshape(part.shape)
        return {name: found[name] for name in arrays}

    def _grouped(self, arrays: Named) -> Iterator[list[str]]:
        """Names whose arrays share a message, in order; all ranks find the same groups."""
        limit = self.sync.bucket_mb * 2**20
        for dtype in dict.fromkeys(array.dtype for array in arrays.values()):
            names: list[str] = []
            num_bytes = 0
            for name, array in arrays.items():
                if array.dtype != dtype:
                    continue
                if names and num_bytes + array.nbytes > limit:
                    yield names
                    names, num_bytes = [], 0
                names.append(name)
                num_bytes += array.nbytes
            if names:
                yield names
