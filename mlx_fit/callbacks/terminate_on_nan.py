"""End training quietly when the loss is no longer a number."""

from __future__ import annotations

from typing import Any

from mlx_fit.callbacks.base import Callback


class TerminateOnNaN(Callback):
    """Turns ``nonfinite="raise"`` into a stop: training ends after the step, ``fit`` returns.

    The loss is then looked at after every step (on devices that work asynchronously: two steps
    later). ``history.stopped_by`` is ``"TerminateOnNaN"``.
    """

    def on_train_begin(self, logs: Any) -> None:
        """Ask the run for a stop instead of an error."""
        self.trainer.stop_on_nonfinite()
