"""What loaders of token batches share: epochs, position, state.

Imports layer 2: data.shares, text.items.
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
from mlx_fit.data.shares import Splittable
from mlx_fit.errors import ResumeError
from mlx_fit.text.items import item, lengths_of

__all__ = ["Piece", "TokenBatches", "text_batch"]

#: A part of a document: its row in the data set, its first token, how many.
Piece = tuple[int, int, int]


def text_batch(dataset: Any, rows: list[list[Piece]], width: int) -> TextBatch:
    """The batch whose rows hold these pieces, one after the other.

    Args:
        dataset: with items ``(tokens, mask)``.
        rows: for each row its pieces; ``width`` tokens together at most.
        width: length of the rows.
    """
    shape = (len(rows), width)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for row, pieces in enumerate(rows):
        start = 0
        for number, (index, first, length) in enumerate(pieces, 1):
            ids, mask = item(dataset, index)
            ids, mask = ids[first : first + length], mask[first : first + length]
            end = start + len(ids)
            tokens[row, start:end] = ids
            # By position, not by token: an EOS that is also the padding token is still learned.
            last = max(end - 1, start)
            targets[row, start:last] = ids[1:]
            weights[row, start:last] = mask[1:] != 0
            segments[row, start:end] = number
            start = end
    return TextBatch(tokens, targets, weights, segments)


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
        self.seed = int.from_bytes(os.urandom(4), "big") if seed is None else natural("seed", seed)
        self.draws_seed = seed is None
        self._position = _Position(epoch=0, batches_consumed=0)
        self._is_loaded = False  # the position is where to start, not where an iterator has come
        self._planned: tuple[tuple[int, int], list[Any]] | None = None

    @abstractmethod
    def _plan(self, epoch: int) -> list[Any]:
        """What each batch of the epoch is made of."""

    @abstractmethod
    def _batch(self, planned: Any) -> TextBatch:
        """One batch of a plan."""

    @abstractmethod
    def _set_up(self) -> dict[str, Any]:
        """Arguments that decide the batches, for the state."""

    def __len__(self) -> int:
        """Batches of an epoch, the same for all."""
        return len(self._plan_of(self._position.epoch))

    def __iter__(self) -> Iterator[TextBatch]:
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
        current = self.state_dict()
        kind = type(self).__name__
        if not isinstance(state, dict) or state.keys() != current.keys():
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ResumeError(f"Not a {kind} state: expected {sorted(current)}, found {found}.")
        free = {"epoch", "batches_consumed"} | ({"seed"} if self.draws_seed else set())
        for field in current:
            if field not in free and state[field] != current[field]:
                raise ResumeError(
                    f"The state was saved with {field}={state[field]!r}, but this {kind} has "
                    f"{field}={current[field]!r}: the remaining batches would not be those that "
                    "were left. Use the same data and arguments."
                )
        for field in ("seed", "epoch", "batches_consumed"):
            if type(state[field]) is not int or state[field] < 0:
                raise ResumeError(f"{field}={state[field]!r} in a {kind} state is no position.")
        self.seed = state["seed"]
        self._position = _Position(state["epoch"], state["batches_consumed"])
        self._is_loaded = True

    def _plan_of(self, epoch: int) -> list[Any]:
        key = (self.seed, epoch)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, self._plan(epoch))
        return self._planned[1]

    def _read(self, position: _Position) -> Iterator[TextBatch]:
        epoch = position.epoch
        for planned in self._plan_of(epoch)[position.batches_consumed :]:
            batch = self._batch(planned)
            position.batches_consumed += 1
            yield batch
        # An old iterator that ends late must not move a loader that has gone elsewhere.
        if epoch == self._position.epoch and not self._is_loaded:
            self._position = _Position(epoch + 1, 0)
