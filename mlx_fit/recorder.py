"""The rows of ``history.steps``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_fit.history import History
from mlx_fit.logs import Values
from mlx_fit.step import TrainStep


class StepRecorder:
    """Writes ``history.steps``: means over the steps since the row before.

    It looks at steps that have left the device's queue, so it never waits for the newest.
    """

    def __init__(self, history: History, step: TrainStep, first_step: int) -> None:
        self._history = history
        self._step = step
        self._first_step = first_step
        self._before = np.zeros(0)
        self._last_window = 0
        self._next: dict[str, Any] | None = None

    def start_epoch(self) -> None:
        """The sums start from zero."""
        self._before = np.zeros(0)

    def state_dict(self, epoch: int) -> dict[str, Any]:
        """Up to where rows were written, and the row that would be next."""
        return {
            "before": self._before.tolist(),
            "last_window": self._last_window,
            "next": self._row(epoch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._before, self._last_window = np.array(state["before"]), state["last_window"]
        self._next = state["next"]

    def record(self, epoch: int) -> None:
        """Add a row for the steps since the last one, if there were any."""
        row = self._row(epoch)
        if row is not None:
            self._history.steps.append(row)
            settled = self._step.settled
            assert settled is not None
            self._before, self._last_window = settled.sums, settled.num_windows

    def _row(self, epoch: int) -> dict[str, Any] | None:
        layout, settled = self._step.sums.layout, self._step.settled
        if settled is None or settled.num_windows == self._last_window:
            return None
        row = {"step": self._first_step + settled.num_windows, "epoch": epoch}
        if not layout.computes:
            # A resumed run that has not seen a batch that counts cannot compute it.
            return (self._next or {}) | row
        since = settled.sums.copy()
        since[: self._before.size] -= self._before
        values = Values(layout, lambda: since, self._step.sums.rows, 0, 0)
        return row | {k: values[k] for k in layout.summed if isinstance(values.get(k), float)}
