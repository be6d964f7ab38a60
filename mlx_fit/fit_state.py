"""Where a fit is: what its loop decides by, what checkpoints hold of it, and how to go on there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_fit.callbacks.base import CallbackList, numbers
from mlx_fit.communicator import open_sums_of_all, open_window_of_all
from mlx_fit.data.feed import Feed
from mlx_fit.ending import Ending
from mlx_fit.errors import (
    CheckpointError,
    DeviceError,
    NonFiniteLossError,
    OutOfMemoryError,
    from_runtime_error,
)
from mlx_fit.history import History
from mlx_fit.protocols import Run
from mlx_fit.recorder import StepRecorder
from mlx_fit.resuming import Resumption, trusting
from mlx_fit.saving import Saver
from mlx_fit.state import TrainState
from mlx_fit.step import TrainStep
from mlx_fit.trainable import set_trainable, trainable_names

# Where in an epoch: before its first batch, among its batches, after them, after its last hook.
BEGIN, BATCHES, EPOCH_END, DONE = "begin", "batches", "epoch_end", "done"
MAX_STEPS = "max_steps"
# Who decides anew, when a run goes on, whether to stop.
ASK_AGAIN = (MAX_STEPS, "EarlyStopping", "Timer")


class FitState:
    """Where one fit is, and its way into a checkpoint and back.

    Args:
        run: the trainer, as callbacks see it.
        step: the training step.
        feed: where its batches come from.
        callbacks: whose states travel along.
        history: the rows so far.
        saver: writes checkpoints, or None.
        check: raises if what would be saved is damaged.
        ending: what ends the fit, and when a save is due by the clock.

    Attributes:
        phase: where in an epoch.
        is_cut: whether a stop ended the epoch before its data did.
        logs: of the epoch's training, once that is complete.
        validated: values of the newest validation of this epoch.
        validated_at: the window after which that was.
        next_event: the window after which something is due.
        next_stop: the window after which something is due that waits for its step.
        first_step: steps that the trainer had taken before this fit.
        recorder: writes the rows of ``history.steps``.
    """

    def __init__(
        self,
        run: Run,
        step: TrainStep,
        feed: Feed,
        callbacks: CallbackList,
        history: History,
        saver: Saver | None,
        check: Callable[[], None],
        ending: Ending,
    ) -> None:
        self._run = run
        self._step = step
        self._feed = feed
        self._callbacks = callbacks
        self._history = history
        self._saver = saver
        self._check = check
        self._ending = ending
        self._ranks = run.communicator
        self.phase = BEGIN
        self.is_cut = False
        self.logs: dict[str, Any] = {}
        self.validated: dict[str, Any] = {}
        self.validated_at = -1
        self.next_event: float = 0
        self.next_stop: float = 0
        ending.set_clock(math.inf if saver is None else saver.due_at)
        self.first_step = run.step - step.num_windows
        self.recorder = StepRecorder(history, step, self.first_step)
        self._kept: TrainState | None = None  # between batches: the last safe place
        self._is_saving = False
        self._trained_at_first = trainable_names(run.model)  # before callbacks freeze or thaw

    # --- into a checkpoint ------------------------------------------------------------------------

    def state(self) -> TrainState:
        """Everything that a fresh process needs to go on from here. Host synchronisation.

        Raises:
            CheckpointError: the data cannot tell where it is.
        """
        run, step, phase = self._run, self._step, self.phase
        step.drain()
        step.follow_freezes()  # an open window is saved as one of what is trained now
        is_event_due = step.num_windows >= self.next_event and not step.window_open
        feed = self._feed.state_dict(step.num_batches)
        if feed is None:
            raise CheckpointError(
                f"{self._feed.source.name} has given a batch that was not trained on, and cannot "
                "go back by one."
            )
        is_inside = phase in (BATCHES, EPOCH_END)
        num_passes = feed["start_epoch"] + feed["passes_finished"]
        trainer = {**run.state_dict(), "num_passes": num_passes}
        trainer["model"] |= step.joined_statistics()
        position = {
            "phase": phase,
            "epoch": run.epoch,
            "num_batches": step.num_batches if is_inside else 0,
            "first_step": self.first_step,
            "trained_at_first": self._trained_at_first,
            "is_event_due": is_event_due,
            "stops": self._ending.stops,
            "validated": self.validated,
            "validated_at": self.validated_at,
            "logs": self.logs if phase == EPOCH_END else {},
            "feed": feed,
            "step": step.state_dict(),
            "recorder": self.recorder.state_dict(run.epoch),
        }
        return TrainState(
            trainer,
            trainable_names(run.model),
            position,
            open_window_of_all(self._ranks, step.open_window()) if step.window_open else {},
            open_sums_of_all(self._ranks, step.sums) if is_inside else None,
            self._callbacks.state_dict(),
            self._history.state_dict(),
            dict(run.info.arguments),
            self._newest_values(),
        )

    def _newest_values(self) -> dict[str, Any]:
        """What is known of the weights as they are, to find the best checkpoint by."""
        if self.phase == DONE:
            return numbers(self._history.last)
        values = self._step.sums.values()
        if self.validated_at == self._step.num_windows:
            values = {**values, **self.validated}
        return numbers(values)

    def keep(self) -> None:
        """Remember this place, in case a hook or the validation that follows raises."""
        if self._saver is not None:
            self._kept = self.state()

    def forget_kept(self) -> None:
        """Let go of it: held on to in training, it would double the memory."""
        self._kept = None

    def save(self) -> None:
        """Save the place that was kept, or this one. Nothing without a checkpoint folder."""
        if self._saver is None:
            return
        self._check()
        state = self._kept or self.state()
        if (mark := _mark(state)) != self._saver.saved:
            with self.telling_of_a_save():
                self._saver.save(state, mark)
        self._ending.set_clock(self._saver.due_at)

    @contextmanager
    def telling_of_a_save(self) -> Iterator[None]:
        """Callbacks hear of what is written inside, once; its time is none of training's."""
        if self._is_saving:
            yield
            return
        self._is_saving = True
        try:
            with self._run.pace.paused():
                self._callbacks.call("on_save_begin", {})
                yield
        finally:
            self._is_saving = False
            self._callbacks.call("on_save_end", {})

    def save_end(self) -> None:
        """Save where the fit has ended, and wait until everything is on disk."""
        if self._saver is None:
            return
        if self.phase == BATCHES or (self.phase != BEGIN and not self.is_cut):
            self.save()
        self._saver.finish()

    def save_after(self, error: Exception) -> Exception:
        """Save what an exception leaves, where that is whole; a failure becomes a note on it.

        Returns:
            The error to raise: one of MLX's is typed, and says what is left and where it is saved.
        """
        typed = from_runtime_error(error)
        memory = typed or error
        if isinstance(memory, OutOfMemoryError) and memory.kind in ("allocation", "buffers"):
            if not self._step.is_whole:
                self._step.recover()
        elif isinstance(typed, (OutOfMemoryError, DeviceError)) and self._step.is_under_way:
            self._step.is_whole = False  # any step under way may be the one that failed
        note = self._save_what_is_whole(error)
        if typed is None:
            if note:
                error.add_note(note)
            return error
        typed = from_runtime_error(
            error, batch_size=self._run.info.batch_size or None, state=self._what_is_left()
        )
        assert typed is not None
        if note:
            typed.add_note(note)
        return typed

    def _save_what_is_whole(self, error: Exception) -> str:
        """Save if possible; why nothing was written, where something should have been."""
        if self._saver is None:
            return ""
        try:
            if self._ranks.size > 1:  # who knows where the others are
                self._saver.abandon()
                return ""
            is_damage = (
                isinstance(error, (NonFiniteLossError, DeviceError, CheckpointError))
                or type(from_runtime_error(error)) is DeviceError
            )
            is_somewhere = self._kept is not None or self.phase == BATCHES
            if not is_damage and self._step.is_whole and is_somewhere:
                self.save()
            self._saver.finish()
        except Exception as second:
            return f"No checkpoint was written after this: {second}"
        return ""

    def _what_is_left(self) -> str:
        """What became of weights and optimizer state, in a sentence."""
        newest = None if self._saver is None else self._saver.newest
        if not self._step.is_whole:
            left = "Weights and optimizer state may be half updated"
            if newest is not None:
                return f"{left}: go on from {newest}."
            next_time = "" if self._saver is not None else ", with checkpoint_dir= to have one then"
            return (
                f"{left}, and no checkpoint was written to go on from: start with a new model and "
                f"optimizer{next_time}."
            )
        saved = "" if newest is None else f"; the newest checkpoint is {newest}"
        return f"Weights and optimizer state are those of step {self._run.step}{saved}."

    # --- and back ---------------------------------------------------------------------------------

    def take_up(self, resumption: Resumption) -> None:
        """Go to where a checkpoint was taken, past what the hooks have done since the start.

        Leaves :attr:`next_event` at 0 if something was due there, at infinity if not.
        """
        resumption.is_taken_up = True
        with trusting(resumption.path):
            changes = self._go_to(resumption)
        resumption.report(changes)

    def _go_to(self, resumption: Resumption) -> list[str]:
        """Go there; returns what is frozen or trained otherwise, in words."""
        state, position, run = resumption.state, resumption.position, self._run
        if self._history.stopped_by in ASK_AGAIN:  # their limits may be others now
            self._history.stopped_by = None
        elif position["stops"]:
            run.stop_training = True
        changes = self._callbacks.load_state_dict(state.callbacks) + self._freeze_as(state)
        resumption.restore()
        self._step.note_replaced_state()
        if position["phase"] in (BATCHES, EPOCH_END):
            # Another batch size gives another number: then the last window closes with the data.
            num_batches = None if resumption.is_rebatched else run.info.steps_per_epoch
            self._step.start_epoch(num_batches)
            sums, is_first = state.sums, self._ranks.rank == 0  # rank 0 has what all had
            if not is_first:
                sums = None if sums is None else sums | {"rows": {}}
            self._step.load_state_dict(position["step"], sums, state.window, is_first)
        self.recorder.load_state_dict(position["recorder"])
        self.validated, self.validated_at = position["validated"], position["validated_at"]
        self.logs = position["logs"]
        self.next_event = 0 if position["is_event_due"] else math.inf
        return changes

    def _freeze_as(self, state: TrainState) -> list[str]:
        """Train what was trained, which callbacks may have changed; unless the user did."""
        assert state.position is not None
        at_first = state.position["trained_at_first"]
        if self._trained_at_first in (at_first, state.trainable):
            self._trained_at_first = at_first
            if state.position["phase"] != BEGIN:  # there the hooks of now have the last word
                set_trainable(self._run.model, {*state.trainable})
            return []
        then, now = {*state.trainable}, {*trainable_names(self._run.model)}
        found = [f"{name} is trained now" for name in sorted(now - then)]
        return found + [f"{name} is frozen now" for name in sorted(then - now)]


def _mark(state: TrainState) -> tuple[Any, ...]:
    """What tells one checkpoint from another of the same step."""
    position = state.position or {}
    return state.trainer["step"], position["phase"], position["epoch"], position["num_batches"]
