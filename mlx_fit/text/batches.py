"""What loaders of token batches share: epochs, position, state.

Imports layer 2: data.position, data.shares, text.items, text.tokens.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fit.batch import TextBatch
from mlx_fit.checks import natural
from mlx_fit.data.order import ORDER_VERSION
from mlx_fit.data.position import check_state
from mlx_fit.data.shares import Splittable
from mlx_fit.errors import ResumeError
from mlx_fit.text.items import flat, item, lengths_of
from mlx_fit.text.tokens import TokenStore

__all__ = ["TokenBatches", "text_batch"]


def text_batch(
    rows: TokenStore | Any, pieces: np.ndarray, row_of: np.ndarray, shape: tuple[int, int]
) -> TextBatch:
    """The batch whose rows hold these pieces, one after the other.

    Args:
        rows: the documents, flat, or a data set of items ``(tokens, mask)``.
        pieces: parts of documents, int64 of shape ``(pieces, 3)``: the number of the document, the
            piece's first token, how many.
        row_of: the row of the batch for each piece, ascending; int64 of shape ``(pieces,)``.
        shape: rows and width of the batch.
    """
    if isinstance(rows, TokenStore):
        ids, mask, lengths = rows.tokens, rows.mask, pieces[:, 2]
        begins = rows.offsets[pieces[:, 0]] + pieces[:, 1]
    else:
        ids, mask, lengths = _read(rows, pieces)
        begins = np.cumsum(lengths) - lengths
    # The pieces of all rows, one after the other, are the places before each row's padding.
    before = np.cumsum(lengths) - lengths
    source = np.repeat(begins - before, lengths)
    source += np.arange(len(source))
    widths = np.bincount(row_of, lengths, shape[0]).astype(np.int64)
    is_filled = np.arange(shape[1]) < widths[:, None]
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    counts, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    tokens[is_filled] = ids.take(source)
    counts[is_filled] = mask.take(source)
    # By position, not by token: an EOS that is also the padding token is still learned.
    targets[:, :-1], weights[:, :-1] = tokens[:, 1:], counts[:, 1:]
    segments = is_filled.astype(np.int32)
    if (row_of[1:] == row_of[:-1]).any():  # documents share a row
        firsts = np.searchsorted(row_of, row_of)
        segments[is_filled] = np.repeat(np.arange(1, len(pieces) + 1) - firsts, lengths)
        # Where a piece ends, what follows is another document's.
        targets[:, :-1] *= segments[:, 1:] == segments[:, :-1]
        weights[:, :-1] *= segments[:, 1:] == segments[:, :-1]
    return TextBatch(tokens, targets, weights, segments)


def _read(dataset: Any, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and masks of the pieces, one after the other, and their lengths."""
    ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
    for index, first, length in pieces.tolist():
        tokens, mask = item(dataset, index)
        ids.append(tokens[first : first + length])
        masks.append(mask[first : first + length] != 0)
    lengths = np.array([len(part) for part in ids[1:]], np.int64)
    return np.concatenate(ids), np.concatenate(masks), lengths


@dataclass
class _Position:
    """How far one pass over the data has come."""

    epoch: int
    batches_consumed: int


class TokenBatches(Splittable):
    """Batches of ``(tokens, mask)`` items, planned by length for each epoch.

    The plan of an epoch is a function of the lengths, the seed and the epoch, so the position is
    two integers, and going to any batch reads no data.

    Args:
        dataset: its items are ``(tokens, mask)``.
        batch_size: rows of a batch.
        seed: None draws one, which the state keeps.

    Attributes:
        dataset, batch_size, seed: as given.
        lengths: tokens of each item, int64.
        draws_seed: whether no seed was given.

    Raises:
        ConfigurationError: an argument is wrong.
        DataError: the data set is empty, or an item is not ``(tokens, mask)``.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int | None) -> None:
        self.dataset = dataset
        self.batch_size = natural("batch_size", batch_size, 1)
        self.lengths = lengths_of(dataset)
        store = flat(dataset)
        self._rows = dataset if store is None else store
        self.seed = int.from_bytes(os.urandom(4), "big") if seed is None else natural("seed", seed)
        self.draws_seed = seed is None
        self._position = _Position(epoch=0, batches_consumed=0)
        self._is_loaded = False  # the position is where to start, not where an iterator has come
        self._planned: tuple[tuple[int, int], list[Any]] | None = None

    @abstractmethod
    def _plan(self, epoch: int) -> list[Any]:
        """What each batch of the epoch is made of."""

    @abstractmethod
    def _batch(self, planned: Any) -> Any:
        """One batch of a plan."""

    @abstractmethod
    def _set_up(self) -> dict[str, Any]:
        """Arguments that decide the batches, for the state."""

    def __len__(self) -> int:
        """Batches of an epoch, the same for all."""
        return len(self._plan_of(self._position.epoch))

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or what a loaded state left of it."""
        start = self._position.batches_consumed if self._is_loaded else 0
        position = _Position(self._position.epoch, start)
        self._position, self._is_loaded = position, False
        return self._read(position)

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter(loader)`` be epoch ``epoch``, counted from 0.

        Setting the epoch where the loader is anyway keeps a loaded position.
        """
        if epoch != self._position.epoch:
            self._position, self._is_loaded = _Position(natural("epoch", epoch), 0), False

    def state_dict(self) -> dict[str, Any]:
        """The position as a small dict for JSON: what was handed out, of which epoch and set-up."""
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "epoch": self._position.epoch,
            "batches_consumed": self._position.batches_consumed,
            "n": len(self.lengths),
            "num_tokens": int(self.lengths.sum()),
            "batch_size": self.batch_size,
            **self._set_up(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next ``iter(loader)`` yields the batches that were left.

        If none were left but the epoch's iterator had not ended, that is an empty remainder. A
        loader made with ``seed=None`` takes the saved seed.

        Raises:
            ResumeError: the state belongs to another set-up, or is no state of this loader.
        """
        check_state(
            state,
            self.state_dict(),
            self.draws_seed,
            kind=type(self).__name__,
            consumed="batches_consumed",
        )
        if state["batches_consumed"] > len(self):
            raise ResumeError(
                f"batches_consumed={state['batches_consumed']} in a {type(self).__name__} state is "
                f"no position: an epoch has {len(self)} batches."
            )
        self.seed = state["seed"]
        self._position = _Position(state["epoch"], state["batches_consumed"])
        self._is_loaded = True

    def _plan_of(self, epoch: int) -> list[Any]:
        key = (self.seed, epoch)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, self._plan(epoch))
        return self._planned[1]

    def _read(self, position: _Position) -> Iterator[Any]:
        epoch = position.epoch
        for planned in self._plan_of(epoch)[position.batches_consumed :]:
            batch = self._batch(planned)
            position.batches_consumed += 1
            yield batch
        # An old iterator that ends late must not move a loader that has gone elsewhere.
        if epoch == self._position.epoch and not self._is_loaded:
            self._position = _Position(epoch + 1, 0)
