"""Faster ranks get more rows of each batch."""

from __future__ import annotations

import time
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.communicator import gather
from mlx_fit.distributed.ring import Ring

WORTH = 0.95  # of the time that a batch takes now: shares that gain less stay as they are


class Balance(Callback):
    """Measures how fast each rank reads and computes, and sets the shares of the next epoch.

    A rank's time is that of the epoch without its first batch, which is compiled, and without
    the collectives, in which it waits for others.

    Args:
        ring: the ranks; its ``rates`` are set, on all of them alike.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._start = 0.0
        self._end = 0.0
        self._collectives = 0.0
        self._num_batches = 0

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Nothing is measured yet."""
        self._num_batches = 0

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """The clock starts after the first batch, and stops after the last one."""
        self._end = time.perf_counter() - sum(self._ring.seconds.values())
        if self._num_batches == 0:
            self._start = self._end
        self._num_batches += 1

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Agree on new shares, if that is worth it."""
        ring = self._ring
        before = ring.rates or (1.0,) * ring.size
        seconds: list[float] = gather(ring, self._end - self._start, "rates")
        counts: list[int] = gather(ring, self._num_batches, "rates")
        if min(counts) < 3 or min(seconds) <= 0:
            return
        rates = [share / taken for share, taken in zip(before, seconds, strict=True)]
        # With the new shares all take as long: the whole work over the whole rate.
        now, then = max(seconds), sum(before) / sum(rates)
        if then < WORTH * now:
            ring.rates = tuple(rate / sum(rates) for rate in rates)

    def state_dict(self) -> dict[str, Any]:
        """The rates in use."""
        return {"rates": None if self._ring.rates is None else list(self._ring.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them, on as many ranks."""
        rates = state["rates"]
        if rates is not None and len(rates) == self._ring.size:
            self._ring.rates = tuple(rates)
