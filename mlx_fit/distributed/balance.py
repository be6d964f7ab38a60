"""Faster ranks get more rows of each batch."""

from __future__ import annotations

import time
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.communicator import gather
from mlx_fit.distributed.ring import WAITING, Ring

GROWTH = 1.1  # of a rate that was shown, by epoch
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
        self._waited = 0.0
        self._shown: dict[int, float] = {}  # rank -> share of a batch that it does in a second

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Nothing is measured yet."""
        self._num_batches = 0
        self._waited = self._ring.seconds.get(WAITING, 0.0)

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """The clock starts after the first batch, and stops after the last one."""
        self._end = time.perf_counter() - sum(self._ring.seconds.values())
        if self._num_batches == 0:
            self._start = self._end
        self._num_batches += 1

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Agree on new shares, if that is worth it."""
        ring = self._ring
        found = gather(
            ring,
            {
                "seconds": self._end - self._start,
                "waited": ring.seconds.get(WAITING, 0.0) - self._waited,
                "num_batches": self._num_batches,
            },
            "rates",
        )
        seconds = [each["seconds"] for each in found]
        if min(each["num_batches"] for each in found) < 3 or min(seconds) <= 0:
            return
        before = ring.rates or (1 / ring.size,) * ring.size
        times = [each["seconds"] / each["num_batches"] for each in found]
        waits = [each["waited"] for each in found]
        rates = self._judged([b / t for b, t in zip(before, times, strict=True)], waits)
        # With the new shares all take as long: the whole work over the whole rate.
        if 1 / sum(rates) < WORTH * max(times):
            ring.rates = tuple(rate / sum(rates) for rate in rates)

    def _judged(self, seen: list[float], waits: list[float]) -> list[float]:
        """The rates of the ranks, of what they seemed to be.

        The one for which the others wait shows its rate. The others read ahead meanwhile, which
        costs them nothing and may look faster than it is: what they have shown before holds, give
        or take a little.
        """
        slowest = waits.index(min(waits))
        self._shown[slowest] = seen[slowest]
        return [
            min(rate, GROWTH * self._shown[rank]) if rank in self._shown else rate
            for rank, rate in enumerate(seen)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The rates in use."""
        return {"rates": None if self._ring.rates is None else list(self._ring.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them, on as many ranks."""
        rates = state["rates"]
        if rates is not None and len(rates) == self._ring.size:
            self._ring.rates = tuple(rates)
