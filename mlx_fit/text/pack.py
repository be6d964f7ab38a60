"""PackedBatches: rows filled with several documents. Imports layer 2: text.batches, text.items."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from mlx_fit.batch import TextBatch
from mlx_fit.checks import natural
from mlx_fit.data.order import order
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text.batches import TokenBatches, text_batch
from mlx_fit.text.items import row_name

__all__ = ["PackedBatches", "best_fit"]

_OVERLONG = ("error", "truncate", "split", "drop")
# How strongly lengths decide the order in which documents are placed: not at all, in part, wholly.
_SORTED_BY = (0.0, 0.5, 0.9, 1.0)
_SPARE = 0.003  # more rows than the best packing has, as the price of a random order


class PackedBatches(TokenBatches):
    """Batches whose rows are filled with whole documents, for models that can keep them apart.

    A token must see its own document only: the model gets ``segments``, as
    :func:`~mlx_fit.text.apply_packed` passes them, and
    :func:`~mlx_fit.text.check_packing` tells whether that works. First tokens are never targets.

    Each epoch visits the documents in a new order and puts each into the fullest row that still has
    room (best fit). All epochs have the same number of rows; the last batch may be short. With
    ``iter``, ``set_epoch`` and state as :class:`~mlx_fit.data.DataLoader` has them.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, whose items are ``(tokens, mask)``, such as
            :class:`TextDataset`.
        batch_size: rows of a batch.
        row_length: tokens of a row.
        seed: of the order. None draws one, which the state keeps.
        overlong: what happens to documents longer than ``row_length``: ``"error"`` raises;
            ``"truncate"`` keeps their beginning; ``"split"`` makes several of them, each beginning
            with the last token of the one before, so that no target is lost; ``"drop"``.

    Attributes:
        num_rows: rows of an epoch.
        num_overlong: documents longer than ``row_length``.
        waste: share of positions that are padding.

    Raises:
        ConfigurationError: an argument is wrong.
        DataError: the data set is empty, an item is not ``(tokens, mask)``, or a document is longer
            than ``row_length``.

    Example:
        >>> from mlx_fit.text import PackedBatches
        >>> documents = [([1] * n, [1] * n) for n in (3, 5, 4, 2)]
        >>> loader = PackedBatches(documents, batch_size=2, row_length=7, seed=0)
        >>> [(batch.tokens.shape, int(batch.weights.sum())) for batch in loader]
        [((2, 7), 10)]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        row_length: int,
        seed: int | None = None,
        *,
        overlong: str = "error",
    ) -> None:
        if overlong not in _OVERLONG:
            raise ConfigurationError(
                f"overlong={overlong!r}; expected one of {', '.join(map(repr, _OVERLONG))}."
            )
        super().__init__(dataset, batch_size, seed)
        self.row_length = natural("row_length", row_length, 2)
        self.overlong = overlong
        self.num_overlong = int(np.count_nonzero(self.lengths > self.row_length))
        self._pieces = self._cut()
        lengths = self._pieces[:, 2]
        fewest = len(best_fit(lengths, np.argsort(-lengths, kind="stable"), self.row_length))
        self.num_rows = fewest + int(_SPARE * fewest)
        self.waste = 1 - float(lengths.sum()) / (self.num_rows * self.row_length)

    def _cut(self) -> np.ndarray:
        """The documents as pieces, int64 of shape ``(pieces, 3)``, none too long or empty."""
        longest = self.row_length
        too_long = np.flatnonzero(self.lengths > longest)
        if len(too_long) and self.overlong == "error":
            index = int(too_long[0])
            raise DataError(
                f"{row_name(self.dataset, index)}: {self.lengths[index]} tokens, more than "
                f"row_length={longest}, as {len(too_long)} of {len(self.lengths)} documents have. "
                "Use a larger row_length, TextDataset(max_length=...), or overlong='truncate', "
                "'split' or 'drop'.",
                index=index,
            )
        kept = np.flatnonzero(self.lengths)
        if self.overlong == "drop":
            kept = kept[self.lengths[kept] <= longest]
        length = np.minimum(self.lengths[kept], longest)
        pieces = np.stack([kept, np.zeros_like(kept), length], axis=1)
        if self.overlong == "split":
            step = longest - 1  # the last token of a piece is the first of the next: it is context
            more = [
                (row, start, min(longest, int(self.lengths[row]) - start))
                for row in too_long.tolist()
                for start in range(step, int(self.lengths[row]) - 1, step)
            ]
            pieces = np.concatenate([pieces, np.array(more, np.int64).reshape(-1, 3)])
        if not len(pieces):
            raise DataError(
                f"No document is left: {self.num_overlong} of {len(self.lengths)} are longer than "
                f"row_length={longest}, and the others are empty. Use a larger row_length."
            )
        return pieces

    def _plan(self, epoch: int) -> list[Any]:
        lengths = self._pieces[:, 2]
        shuffled = order(self.seed, epoch, len(lengths))[:]
        rank = np.empty(len(lengths))
        rank[shuffled] = np.linspace(0, 1, len(lengths))
        for strength in _SORTED_BY:
            # Long documents first fit better, at random they mix better: as random as is possible.
            key = strength * -lengths / lengths.max() + (1 - strength) * rank
            rows = best_fit(lengths, np.lexsort((rank, key)), self.row_length)
            if len(rows) <= self.num_rows:
                break
        self._spread(rows)
        rows = [rows[i] for i in order(self.seed, -1 - epoch, len(rows))[:]]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _spread(self, rows: list[list[int]]) -> None:
        """Divide rows until there are ``num_rows``, so that all epochs are equally long."""
        for row in list(rows):
            if len(rows) == self.num_rows:
                return
            if len(row) > 1:
                rows.append([row.pop()])

    def _batch(self, planned: Any) -> TextBatch:
        row_of = np.repeat(np.arange(len(planned)), [len(row) for row in planned])
        pieces = self._pieces[np.concatenate(planned)]
        return text_batch(self._rows, pieces, row_of, (len(planned), self.row_length))

    def _set_up(self) -> dict[str, Any]:
        return {"row_length": self.row_length, "overlong": self.overlong}


def best_fit(lengths: np.ndarray, visited: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of documents: each goes into the fullest row that has room for it.

    Best fit (D. S. Johnson, "Near-Optimal Bin Packing Algorithms", 1973), online: documents are
    placed in the given order and never moved.

    Args:
        lengths: tokens of each document, at most ``capacity``.
        visited: the order of documents.
        capacity: tokens of a row.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room that rows have, ascending
    with_room: dict[int, list[int]] = {}
    for index, length in zip(visited.tolist(), lengths[visited].tolist(), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(index)
        if room > length:
            left = room - length
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(row)
    return rows
