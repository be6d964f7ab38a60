"""How long ranks wait for each other, and how long what they send takes."""

from __future__ import annotations

import time
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.communicator import gather
from mlx_fit.distributed.ring import WAITING, Ring

ADVISE_ABOVE = 0.3  # of the time of a step


class SyncMonitor(Callback):
    """Adds to an epoch's logs what the exchange between ranks has cost, per update.

    ``sync.wait_ms`` is how long this rank has waited for the slowest one, ``sync.transfer_ms`` how
    long the sums took once all were there, ``sync.share`` both as a share of the step's time,
    ``sync.mb`` what this rank has sent, and ``sync.straggler`` the rank for which the others wait.
    The header of an update, which is small, tells waiting from sending; nothing is sent for it.
    Give it to all ranks, before loggers. Histories hold rank 0's values.

    Above a share of 30 % a line on rank 0 says what would help. Of one process it logs nothing.

    Attributes:
        wait_ms, transfer_ms, share, mb, straggler: of the newest epoch.

    Example:
        >>> callback = SyncMonitor()
        >>> # trainer.fit(train, callbacks=[callback, TensorBoard("runs/a")])
    """

    def __init__(self) -> None:
        self.wait_ms = 0.0
        self.transfer_ms = 0.0
        self.share = 0.0
        self.mb = 0.0
        self.straggler = 0
        self._seconds = 0.0
        self._since = 0.0
        self._before: dict[str, float] = {}
        self._bytes_before = 0
        self._steps_before = 0
        self._has_advised = False

    def on_train_begin(self, logs: Any) -> None:
        """The advice is given once a fit."""
        self._has_advised = False

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Start counting."""
        if isinstance(ring := self.trainer.communicator, Ring):
            self._before, self._bytes_before = dict(ring.seconds), ring.num_bytes
        self._steps_before, self._seconds = self.trainer.step, 0.0

    def on_train_batch_begin(self, batch: int, logs: Any) -> None:
        """A step begins."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """A step has ended."""
        self._seconds += time.perf_counter() - self._since

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Log the epoch."""
        ring, num_steps = self.trainer.communicator, self.trainer.step - self._steps_before
        if not isinstance(ring, Ring) or not num_steps:
            return
        spent = {phase: s - self._before.get(phase, 0.0) for phase, s in ring.seconds.items()}
        wait = spent.get(WAITING, 0.0)
        transfer = sum(spent.get(phase, 0.0) for phase in ("gradients", "weights"))
        waits: list[float] = gather(ring, wait, "waits")
        self.wait_ms, self.transfer_ms = 1e3 * wait / num_steps, 1e3 * transfer / num_steps
        self.share = (wait + transfer) / max(self._seconds, 1e-9)
        self.mb = (ring.num_bytes - self._bytes_before) / 1e6 / num_steps
        self.straggler = waits.index(min(waits))
        for name in ("wait_ms", "transfer_ms", "share", "mb", "straggler"):
            logs[f"sync.{name}"] = float(getattr(self, name))
        if self.share > ADVISE_ABOVE and ring.rank == 0 and not self._has_advised:
            self._has_advised = True
            print(self.advice(), flush=True)

    def advice(self) -> str:
        """One line on what takes the time, and what would help."""
        head = f"Synchronising took {self.share:.0%} of a step"
        if self.wait_ms > self.transfer_ms:
            return (
                f"{head}, {self.wait_ms:.1f} ms of it waiting for rank {self.straggler}: see what "
                "slows that rank down; gradient_accumulation meets less often."
            )
        return (
            f"{head}, {self.transfer_ms:.1f} ms of it sending {self.mb:.1f} MB: "
            "gradient_accumulation sends less often, SyncPolicy(reduce_dtype='bfloat16') half, "
            "compress='int8' a quarter, strategy='local_sgd' once in several updates."
        )
