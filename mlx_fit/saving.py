"""The checkpoints of one fit: when they are due, and what is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx

from mlx_fit._tree import named_arrays
from mlx_fit.callbacks.monitor import Monitor
from mlx_fit.checkpoint.format import Snapshot, frozen_names, take_snapshot
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.checkpoint.store import CheckpointStore
from mlx_fit.checkpoint.writer import Writer
from mlx_fit.communicator import on_first
from mlx_fit.errors import NonFiniteLossError
from mlx_fit.protocols import Run
from mlx_fit.state import TrainState


class Saver:
    """Saves a fit when its policy says so.

    Args:
        store: where to.
        policy: when, and what stays.
        run: the trainer, as callbacks see it.
        gone_on_from: the checkpoint that the fit goes on from, or None.

    Rank 0 writes; the others wait for it, and raise what it raises.

    Attributes:
        due_at: the ``time.perf_counter()`` from which on the next step is saved.
        saved: what the newest checkpoint holds: step, phase and epoch.
    """

    def __init__(
        self,
        store: CheckpointStore,
        policy: CheckpointPolicy,
        run: Run,
        gone_on_from: Path | None,
    ) -> None:
        self.saved: tuple[Any, ...] | None = None
        self._newest = gone_on_from
        self._store = store
        self._policy = policy
        self._run = run
        self._writer = Writer(policy.background)
        self._hashes: dict[str, str] = {}
        # A user's own running statistics are frozen and change all the same.
        self._at_start: dict[str, mx.array] = {}
        self._unchanged: set[str] = set()
        if policy.frozen == "expect":
            weights = dict(named_arrays(run.model.parameters()))
            self._at_start = {name: weights[name] for name in frozen_names(run.model)}
        self._monitor: Monitor | None = None
        if policy.monitor is not None:
            self._monitor = Monitor(policy.monitor, policy.mode, "CheckpointPolicy")
        self._set_clock()

    def _set_clock(self) -> None:
        seconds = self._policy.num_seconds
        self.due_at = math.inf if seconds is None else perf_counter() + seconds

    def next_step(self, done: int) -> int | None:
        """The next step that is saved for its number, None if none is."""
        every = self._policy.num_steps
        return None if every is None else (done // every + 1) * every

    def is_due(self, done: int, is_late: bool) -> bool:
        """Whether to save after ``done`` steps of this fit; ``is_late`` says that it is by time."""
        every = self._policy.num_steps
        return is_late or (every is not None and done % every == 0)

    def is_due_after(self, epoch: int) -> bool:
        """Whether to save at the end of an epoch (0-based)."""
        every = self._policy.num_epochs
        return every is not None and (epoch + 1) % every == 0

    def check_monitor(self, logs: Mapping[str, Any]) -> None:
        """Raise at an epoch's end if the value that decides on the best does not appear."""
        if self._monitor is not None:
            self._monitor.at_epoch_end(self._run, logs)

    def save(self, state: TrainState, mark: tuple[Any, ...]) -> None:
        """Save, unless what ``mark`` stands for is saved already.

        Raises:
            CheckpointWriteError, NonFiniteLossError: this save, or in the background the one
                before it, failed.
        """
        if mark == self.saved:
            return
        on_first(self._run.communicator, partial(self._submit, state), state.trainer["step"])
        self.saved = mark
        self._set_clock()

    def _submit(self, state: TrainState) -> None:
        higher = None if self._monitor is None else self._monitor.higher_is_better(self._run)
        snapshot = take_snapshot(state, self._expected(state))
        self._writer.submit(partial(self._write, snapshot, higher))

    def _expected(self, state: TrainState) -> list[str]:
        """The frozen parameters that are not written: those that training has left alone."""
        if self._at_start:
            now = state.trainer["model"]
            equal = {k: mx.array_equal(v, now[k]) for k, v in self._at_start.items()}
            self._unchanged = {name for name, is_equal in equal.items() if is_equal.item()}
            self._at_start = {}
        if self._policy.frozen == "write":
            return []
        return [name for name in frozen_names(self._run.model) if name in self._unchanged]

    def _write(self, snapshot: Snapshot, higher: bool | None) -> None:
        try:
            self._newest = self._store.save(snapshot, self._hashes)
        except NonFiniteLossError as error:
            if not self._run.quiet_on_nonfinite:
                raise
            # TerminateOnNaN asked for a quiet end; the last good checkpoint stays.
            warnings.warn(str(error), stacklevel=2)
            return
        self._store.prune(self._policy, higher, snapshot.document["step"])

    @property
    def newest(self) -> Path | None:
        """The newest whole checkpoint of this run: written by this fit, or gone on from.

        What else is in the folder may be damaged, or of a run that was given up.
        """
        if self._run.communicator.rank and self.saved is not None:  # rank 0 has written it
            return self._store.steps().get(self.saved[0], self._newest)
        return self._newest

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointWriteError, NonFiniteLossError: it failed.
        """
        on_first(self._run.communicator, self._writer.wait)

    def abandon(self) -> None:
        """Wait for the last save after an error, without a word to other ranks."""
        self._writer.wait()
