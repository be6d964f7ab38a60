"""The callback that fills the history."""

from __future__ import annotations

from typing import Any

from mlx_fit.callbacks.base import Callback, numbers
from mlx_fit.history import History


class HistoryRecorder(Callback):
    """Appends each epoch's logs, with what the callbacks before it added, to the history."""

    def __init__(self, history: History) -> None:
        self._history = history

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Keep the row, its numbers as Python floats."""
        self._history.append(epoch, {**logs, **numbers(logs)})
