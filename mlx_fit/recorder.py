"""The rows of ``history.steps``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from mlx_fit.history import History
from mlx_fit.logs import Values
from mlx_fit.step import TrainStep

AT_ONCE = 5  # rows that are written together, when somebody looks or the next is due


class _Place(NamedTuple):
    """Where a row ends: vectors by then, window and epoch."""

    num_added: int
    window: int
    epoch: int


class StepRecorder:
    """Writes ``history.steps``: means over the steps since the row before.

    When a row is due only its place is noted, which waits for no step. Rows are written some at a
    time, because their arithmetic is short and what it runs has left the cache by the next one.
    """

    def __init__(self, history: History, step: TrainStep, first_step: int) -> None:
        self._history = history
        self._step = step
        self._first_step = first_step
        self._before = np.zeros(0)
        self._last_window = 0
        self._due: list[_Place] = []  # rows that are not written
        self._next: dict[str, Any] | None = None
        history.catch_up = self.write

    def start_epoch(self) -> None:
        """The sums start from zero."""
        self._before = np.zeros(0)

    def state_dict(self, epoch: int) -> dict[str, Any]:
        """Up to where rows were written, and the row that would be next."""
        self.write()
        window = self._step.num_windows
        is_new = window != self._last_window
        return {
            "before": self._before.tolist(),
            "last_window": self._last_window,
            "next": self._row(window, epoch, self._step.sums.fold()) if is_new else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._before, self._last_window = np.array(state["before"]), state["last_window"]
        self._next = state["next"]

    def note(self, epoch: int) -> None:
        """Have a row for the steps since the last one, if there were any."""
        window = self._step.num_windows
        if window == self._last_window:
            return
        if len(self._due) == AT_ONCE:
            self.write()
        self._step.sums.keep()
        self._due.append(_Place(self._step.sums.num_added, window, epoch))
        self._last_window = window
        if not self._step.sums.layout.computes:
            self.write()  # now: the metrics of a resumed run may be others, and move the sums

    def write(self) -> None:
        """Write the rows that were noted. Host synchronisation with the step of the newest."""
        if not self._due:
            return
        sums, due = self._step.sums, self._due
        sums.fold(due[-1].num_added)
        kept, sums.totals_kept, self._due = sums.totals_kept, [], []
        for place, totals in zip(due, kept, strict=True):
            self._history.steps.append(self._row(place.window, place.epoch, totals))
            self._before = totals

    def close(self) -> None:
        """Write what an error has left: the fit is over.

        Of a step that has failed there is no row. Nor is there one where a metric raises, which
        must not take the place of the error that ended the fit.
        """
        self._history.catch_up = None
        with suppress(Exception):
            self.write()

    def _row(self, window: int, epoch: int, totals: np.ndarray) -> dict[str, Any]:
        """The row of the steps since the last one that was written, up to a window."""
        layout = self._step.sums.layout
        row = {"step": self._first_step + window, "epoch": epoch}
        if not layout.computes:
            # A resumed run that has not seen a batch that counts cannot compute it.
            return (self._next or {}) | row
        since = totals.copy()
        since[: self._before.size] -= self._before
        values = Values(layout, lambda: since, self._step.sums.rows, 0, 0)
        return row | {k: values[k] for k in layout.summed if isinstance(values.get(k), float)}
