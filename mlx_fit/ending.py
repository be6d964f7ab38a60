"""What ends a fit, or has it save: the same on all ranks, at the same step."""

from __future__ import annotations

import math
from time import perf_counter

import mlx.core as mx

from mlx_fit.communicator import first_known
from mlx_fit.history import History
from mlx_fit.protocols import Run
from mlx_fit.signals import Interruption

SIGNALS = ("SIGINT", "SIGTERM")


class Ending:
    """Whether a fit is asked to stop, was interrupted, or has a save due by the clock.

    A process by itself sees that at once. Several ranks hear of what one of them wants with the
    next update, or where they meet between epochs, and act on it together.

    Args:
        run: whose ``stop_training`` callbacks set.
        interruption: notes the signals of this process.
        history: where the reason of a stop is written.

    Attributes:
        save_at: the ``time.perf_counter()`` from which on a save is due; with several ranks the
            infinite past or future, as rank 0's clock says.
    """

    def __init__(self, run: Run, interruption: Interruption, history: History) -> None:
        self.save_at = math.inf
        self._run = run
        self._ranks = run.communicator
        self._is_alone = run.communicator.size == 1
        self._interruption = interruption
        self._history = history
        self._stops = False
        self._signal: str | None = None
        self._clock = math.inf

    @property
    def stops(self) -> bool:
        """Whether training is to end after this update."""
        return self._run.stop_training if self._is_alone else self._stops

    @property
    def signal(self) -> str | None:
        """The signal that interrupted the run, or None."""
        return self._interruption.name if self._is_alone else self._signal

    def is_now(self, is_window_open: bool) -> bool:
        """Whether to end after this batch.

        A signal lets an open window close: a resumed run must cut windows in the same places.
        """
        if self._is_alone:
            is_interrupted = self._interruption.name is not None
            return self._run.stop_training or (is_interrupted and not is_window_open)
        return self._stops or (self._signal is not None and not is_window_open)

    def set_clock(self, due_at: float) -> None:
        """When the next save is due, as ``time.perf_counter()`` counts."""
        self._clock = due_at
        self.save_at = due_at if self._is_alone else math.inf

    def decide(self, reason: str) -> None:
        """End training here, for a reason that all ranks see at the same step."""
        self._run.request_stop(reason)
        self._stops = True

    # --- with other ranks -------------------------------------------------------------------------

    def wishes(self) -> list[float]:
        """What this rank asks for, as numbers to be summed over the ranks."""
        is_late = self._ranks.rank == 0 and perf_counter() >= self._clock
        name = self._interruption.name
        return [
            float(self._run.stop_training),
            *(float(name == s) for s in SIGNALS),
            float(is_late),
        ]

    def hear(self, totals: list[float]) -> None:
        """What all ranks together ask for."""
        stops, *signals, saves = totals
        self.save_at = -math.inf if saves else math.inf
        for name, count in zip(SIGNALS, signals, strict=True):
            if count:
                self._signal = name  # SIGTERM, the last, counts more
        if stops and not self._stops:
            reason = first_known(self._ranks, self._history.stopped_by)
            self._stops = self._run.stop_training = True
            if self._history.stopped_by is None:
                self._history.stopped_by = reason

    def agree(self) -> None:
        """Hear what other ranks ask for, between updates."""
        if not self._is_alone:
            (found,) = self._ranks.sum([mx.array(self.wishes())])
            self.hear(found.tolist())  # type: ignore[arg-type]
