"""The time that training waits for data, measured from hooks."""

from __future__ import annotations

import time
from typing import Any

from mlx_fit.callbacks.base import Callback


class DataWait:
    """Adds up the time from the end of a batch to the beginning of the next.

    Evaluation in between is not counted; what else happens there (hooks of other callbacks, a
    checkpoint) is.

    Attributes:
        seconds: waited in this epoch.
        num_batches: batches waited for.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_batches = 0
        self._since = 0.0
        self._evaluation = 0.0

    def listen(self, callback: Callback) -> None:
        """Be the callback's batch hooks, without a detour, where its class has none of its own."""
        for hook, method in (
            ("on_train_batch_begin", self.batch_began),
            ("on_train_batch_end", self.batch_ended),
        ):
            if getattr(type(callback), hook) is getattr(Callback, hook):
                setattr(callback, hook, method)

    def start_epoch(self) -> None:
        """Waiting for the first batch begins."""
        self.seconds, self.num_batches = 0.0, 0
        self._since = time.perf_counter()

    def batch_began(self, batch: int, logs: Any) -> None:
        """The batch is here."""
        self.seconds += time.perf_counter() - self._since
        self.num_batches += 1

    def batch_ended(self, batch: int, logs: Any) -> None:
        """The next batch is asked for."""
        self._since = time.perf_counter()

    def evaluation_began(self) -> None:
        """Stop the clock."""
        self._evaluation = time.perf_counter()

    def evaluation_ended(self) -> None:
        """Let the clock go on."""
        self._since += time.perf_counter() - self._evaluation

    @property
    def ms_per_batch(self) -> float:
        """The mean wait of the epoch, in milliseconds."""
        return 1e3 * self.seconds / max(self.num_batches, 1)
