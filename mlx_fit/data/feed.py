"""Epochs and evaluations made of a source's passes. Imports layer 2: data.sources."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Iterator
from typing import Any

from mlx_fit.data.sources import Source
from mlx_fit.errors import DataError

__all__ = ["Feed", "Replay"]

_END = object()


class Feed:
    """The batches of one epoch after another, for training.

    Without ``steps_per_epoch`` an epoch is one pass over the data. With it, passes are joined and
    each epoch has exactly that many batches, going on where the last one stopped. No batch is drawn
    before it is asked for.

    Args:
        source: where batches come from.
        steps_per_epoch: batches of an epoch, or None.
        start_epoch: shuffle epoch of the first pass.

    Attributes:
        passes_started: passes over the data that were begun. A later feed of the same data that
            starts at ``start_epoch + passes_started`` shuffles on.
        passes_finished: passes that came to their end.
        num_drawn: batches drawn in this epoch.
        has_ended: whether this epoch has given all of its batches.
    """

    def __init__(
        self, source: Source, steps_per_epoch: int | None = None, start_epoch: int = 0
    ) -> None:
        self.source = source
        self.steps_per_epoch = steps_per_epoch
        self.start_epoch = start_epoch
        self.passes_started = 0
        self.passes_finished = 0
        self.num_drawn = 0
        self.has_ended = False
        self._pass: Iterator[Any] | None = None  # the one that the next epoch goes on with
        self._num_in_pass = 0  # batches drawn of the current pass
        self._newest: Any = None

    def epoch(self) -> Iterator[Any]:
        """The batches of the next epoch.

        Raises:
            DataError: the data gave no batch at all, or it is an iterator that ended before the
                epoch did. Raised where the missing batch is asked for.
        """
        self.num_drawn, self.has_ended = 0, False
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        return self._one_pass() if self.steps_per_epoch is None else self._joined()

    def _one_pass(self) -> Iterator[Any]:
        if self._pass is None:
            if self.source.one_shot and self.passes_finished:
                raise self._ran_out(0)
            self._pass = self._start_pass()
        for batch in self._pass:
            self.num_drawn += 1
            self._num_in_pass += 1
            self._newest = batch
            yield batch
        self._end_pass()
        self.has_ended = True

    def _joined(self) -> Iterator[Any]:
        for step in range(self.num_drawn, self.steps_per_epoch or 0):
            batch = _END if self._pass is None else next(self._pass, _END)
            while batch is _END:
                if self._pass is not None:
                    self._end_pass()
                if self.source.one_shot and self.passes_finished:
                    raise self._ran_out(step)
                self._pass = self._start_pass()
                batch = next(self._pass, _END)
            self.num_drawn += 1
            self._num_in_pass += 1
            self._newest = batch
            yield batch
        if self._pass is not None and self._num_in_pass == self.source.num_batches:
            # All were given: let the pass end now, because a DataLoader counts only ended epochs.
            # Should its len() have been too small, nothing is lost.
            batch = next(self._pass, _END)
            if batch is _END:
                self._end_pass()
            else:
                self._pass = itertools.chain([batch], self._pass)
        self.has_ended = True

    def state_dict(self, num_taken: int) -> dict[str, Any] | None:
        """Where the data is, as plain values; None if its source cannot tell.

        Args:
            num_taken: batches of this epoch that were taken: all that were drawn, or one less.
        """
        untaken = self._newest if num_taken < self.num_drawn else None
        num_in_pass = self._num_in_pass - (untaken is not None)
        position = self.source.position(num_in_pass, untaken)
        if position is None:
            return None
        return {
            "start_epoch": self.start_epoch,
            "passes_started": self.passes_started,
            "passes_finished": self.passes_finished,
            "num_drawn": num_taken,
            "num_in_pass": num_in_pass,
            "is_open": self._pass is not None,
            "has_ended": self.has_ended,
            "source": position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state_dict` was taken.

        Raises:
            ResumeError: the data is not what it was.
        """
        self.start_epoch = state["start_epoch"]
        self.passes_started = state["passes_started"]
        self.passes_finished = state["passes_finished"]
        self.num_drawn, self.has_ended = state["num_drawn"], state["has_ended"]
        self._num_in_pass = state["num_in_pass"]
        self.source.restore(state["source"], self._num_in_pass if state["is_open"] else 0)
        if state["is_open"]:
            self._pass = self.source.batches(self.start_epoch + self.passes_started - 1)

    def rest(self) -> Iterator[Any]:
        """The batches that are left of the epoch in which a loaded state was taken."""
        return iter(()) if self.has_ended else self._rest()

    def close(self) -> None:
        """Let go of a pass that was left early: a loader's threads and processes end now.

        A user's own iterator, which somebody may go on with, stays as it is.
        """
        unfinished, self._pass = self._pass, None
        if isinstance(unfinished, Generator) and not self.source.one_shot:
            unfinished.close()

    def _start_pass(self) -> Iterator[Any]:
        batches = self.source.batches(self.start_epoch + self.passes_started)
        self.passes_started += 1
        self._num_in_pass = 0
        return batches

    def _end_pass(self) -> None:
        self._pass = None
        self.passes_finished += 1
        if self._num_in_pass == 0:
            raise DataError(
                f"{self.source.name} gave no batch in pass {self.passes_finished} over it"
                + (
                    ": the iterator is empty."
                    if self.source.one_shot
                    else ". What gives batches "
                    "must start anew for each pass; a function must return a new iterator."
                )
            )

    def _ran_out(self, step: int) -> DataError:
        steps = self.steps_per_epoch
        wanted = f"after {step} of {steps} steps of an epoch" if steps else "when an epoch started"
        return DataError(
            f"{self.source.name} is an iterator, which can be read once. It had given "
            f"{self._num_in_pass} batches and ran out {wanted}. Pass a function that returns a new "
            "iterator, or a list of batches."
        )


class Replay:
    """The batches of an evaluation, from the top each time.

    An iterator cannot start again, so what the first evaluation draws from it is kept in memory
    and replayed.

    Args:
        source: where batches come from, best not shuffled.
        steps: batches of an evaluation at most. None: a whole pass.
    """

    def __init__(self, source: Source, steps: int | None = None) -> None:
        self.source = source
        self.steps = steps
        self._iterator = source.batches(0) if source.one_shot else None
        self._kept: list[Any] = []
        self._has_warned = False

    def batches(self) -> Iterator[Any]:
        """The batches of one evaluation. Fewer than ``steps`` are evaluated with one warning.

        Raises:
            DataError: the data gave no batch at all.
        """
        whole = self.source.batches(0) if self._iterator is None else self._replayed(self._iterator)
        count = 0
        for batch in itertools.islice(whole, self.steps):
            count += 1
            yield batch
        if count == 0:
            raise DataError(f"{self.source.name} gave no batch.")
        if self.steps is not None and count < self.steps and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.source.name} has {count} batches, fewer than the {self.steps} steps asked "
                "for: these are evaluated.",
                stacklevel=2,
            )

    def _replayed(self, iterator: Iterator[Any]) -> Iterator[Any]:
        yield from self._kept
        for batch in iterator:
            self._kept.append(batch)
            yield batch
