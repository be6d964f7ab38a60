"""One call of ``Trainer.fit``: its schedule of epochs, evaluations and records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_fit.callbacks.base import CallbackList
from mlx_fit.checks import natural
from mlx_fit.data.class_weights import ClassWeights
from mlx_fit.data.feed import Feed, Replay
from mlx_fit.errors import ConfigurationError, NonFiniteLossError, Preempted
from mlx_fit.evaluation import EvaluationStep
from mlx_fit.history import History
from mlx_fit.logs import Values
from mlx_fit.loop import run_batches
from mlx_fit.passes import evaluate_pass, plain
from mlx_fit.protocols import Run
from mlx_fit.signals import Interruption
from mlx_fit.step import TrainStep


@dataclass(frozen=True)
class Schedule:
    """When a fit starts, ends, validates and records; the arguments of ``fit`` that are numbers."""

    epochs: int = 1
    initial_epoch: int = 0
    max_steps: int | None = None
    steps_per_epoch: int | None = None
    validation_freq: int | list[int] | str = 1
    validation_steps: int | None = None
    log_every: int = 10
    validates_every: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        natural("epochs", self.epochs)
        natural("initial_epoch", self.initial_epoch)
        natural("log_every", self.log_every, 1)
        for name in ("max_steps", "steps_per_epoch", "validation_steps"):
            if getattr(self, name) is not None:
                natural(name, getattr(self, name), 1)
        object.__setattr__(self, "validates_every", _steps_of(self.validation_freq))

    def validates_after(self, epoch: int) -> bool:
        """Whether validation runs at the end of an epoch (0-based)."""
        if self.validates_every is not None:
            return False
        if isinstance(self.validation_freq, list):
            return epoch + 1 in self.validation_freq
        assert isinstance(self.validation_freq, int)
        return (epoch + 1) % self.validation_freq == 0


def _steps_of(validation_freq: Any) -> int | None:
    """The N of "N steps"; None for a frequency in epochs."""
    match = re.fullmatch(r"\s*(\d+)\s+steps?\s*", str(validation_freq))
    if isinstance(validation_freq, str) and match and int(match[1]) > 0:
        return int(match[1])
    whole = validation_freq if isinstance(validation_freq, list) else [validation_freq]
    if whole and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in whole):
        return None
    raise ConfigurationError(
        f"validation_freq={validation_freq!r}; expected a positive int (every so many epochs), a "
        'list of epochs counted from 1, or "500 steps".'
    )


class Fit:
    """Trains for the epochs of a schedule and keeps the history.

    Args:
        run: the trainer, as callbacks see it.
        schedule: when to do what.
        step: the training step.
        feed: training batches, epoch by epoch.
        weigh: adds class weights to a batch, or None.
        evaluation_step: the step for validation.
        validation: name -> batches; the name is ``""`` for a single set.
        callbacks: who is told.
        history: where rows go.
        interruption: tells whether a signal asked for the end.
    """

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        step: TrainStep,
        feed: Feed,
        weigh: ClassWeights | None,
        evaluation_step: EvaluationStep,
        validation: Mapping[str, Replay],
        callbacks: CallbackList,
        history: History,
        interruption: Interruption,
    ) -> None:
        self._run = run
        self._schedule = schedule
        self._step = step
        self._feed = feed
        self._weigh = weigh
        self._evaluation_step = evaluation_step
        self._validation = validation
        self._callbacks = callbacks
        self._history = history
        self._interruption = interruption
        self._first_step = run.step
        self._next_event = 0
        self._validated: dict[str, float] = {}
        self._recorder = StepRecorder(history, step, run.step)

    def __call__(self) -> History:
        """Run to the end."""
        schedule, run, callbacks = self._schedule, self._run, self._callbacks
        callbacks.call("on_train_begin", {})
        self._plan_next_event()
        logs: dict[str, Any] = {}
        for epoch in range(schedule.initial_epoch, schedule.epochs):
            run.epoch = epoch
            logs = self._epoch(epoch)
            self._raise_if_terminated()
            if run.stop_training or self._interruption.name:
                break
        callbacks.call("on_train_end", logs)
        if self._interruption.name:
            self._history.stopped_by = self._interruption.name
        elif run.stop_training and self._history.stopped_by is None:
            self._history.stopped_by = "stop_training"
        self._raise_if_terminated()
        return self._history

    # --- an epoch ---------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, validate if it is due, record. Empty if a signal cut it short."""
        run, callbacks, step = self._run, self._callbacks, self._step
        self._validated = {}
        callbacks.call("on_epoch_begin", epoch, {})
        step.start_epoch(run.info.steps_per_epoch)
        self._recorder.start_epoch()
        batches = self._feed.epoch()
        always, displays = callbacks.train_batch_end()
        run_batches(
            batches if self._weigh is None else map(self._weigh, batches),
            step,
            callbacks.bound("on_train_batch_begin"),
            always,
            self._is_over,
            displays,
        )
        if step.window_open:
            step.close_window()
            step.settle()
            self._is_over()
        step.drain()
        self._check_loss()
        self._recorder.record(self._run.epoch)
        if self._interruption.name:
            return {}
        logs = self._training_logs()
        if self._validation and self._schedule.validates_after(epoch):
            self._validate()
            if self._interruption.name:
                # The epoch's training is complete, its end is not: the row is kept, no hook called.
                self._history.append(epoch, logs | self._update_logs())
                return {}
        logs = {**logs, **self._validated, **self._update_logs()}
        callbacks.call("on_epoch_end", epoch, logs)
        return logs

    def _training_logs(self) -> dict[str, Any]:
        values = self._step.sums.values()
        return {key: plain(value) for key, value in values.items() if key not in UPDATE_KEYS}

    def _update_logs(self) -> dict[str, Any]:
        values = dict(self._step.sums.values())
        logs = {key: values[key] for key in UPDATE_KEYS if key in values}
        if self._step.num_skipped:
            logs["skipped_updates"] = logs.get("skipped_updates", 0.0) + self._step.num_skipped
        rate = self._step.learning_rate
        return logs if rate is None else {"learning_rate": float(np.array(rate)), **logs}

    # --- between batches --------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """After a batch: do what is due at this step, and say whether the epoch ends here."""
        if self._step.num_windows >= self._next_event and not self._step.window_open:
            self._event()
        return self._run.stop_training or self._interruption.name is not None

    def _event(self) -> None:
        """Record, validate or end, whatever falls on this step."""
        schedule, done = self._schedule, self._step.num_windows
        self._check_loss()
        if done % schedule.log_every == 0:
            self._recorder.record(self._run.epoch)
        every = schedule.validates_every
        if every and self._validation and done % every == 0 and not self._interruption.name:
            self._validate()
        if schedule.max_steps is not None and done >= schedule.max_steps:
            self._run.request_stop("max_steps")
        self._plan_next_event()

    def _plan_next_event(self) -> None:
        schedule, done = self._schedule, self._step.num_windows
        marks = [(done // schedule.log_every + 1) * schedule.log_every]
        if schedule.validates_every and self._validation:
            marks.append((done // schedule.validates_every + 1) * schedule.validates_every)
        if schedule.max_steps is not None:
            marks.append(schedule.max_steps)
        if self._run.quiet_on_nonfinite:
            marks.append(done + 1)
        self._next_event = min(marks)

    def _check_loss(self) -> None:
        """Raise for a non-finite loss that the step has noted since."""
        settled = self._step.settled
        if settled is None or settled.bad_window == 0:
            return
        number, value = self._first_step + settled.bad_window, settled.bad_loss
        if self._run.quiet_on_nonfinite:
            self._run.request_stop("TerminateOnNaN")
            return
        raise NonFiniteLossError(
            self._step.explain_bad_loss(number, self._run.epoch, value),
            step=number,
            epoch=self._run.epoch,
            value=value,
        )

    def _raise_if_terminated(self) -> None:
        if self._interruption.name == "SIGTERM":
            self._history.stopped_by = "SIGTERM"
            step = self._run.step
            raise Preempted(f"SIGTERM ended the run after step {step}.", step=step)

    # --- validation -------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Evaluate every validation set; leaves no trace on weights, modes or the random key."""
        found: dict[str, Any] = {}
        for name, replay in self._validation.items():
            prefix = f"val_{name}_" if name else "val_"
            values = evaluate_pass(
                self._run, self._evaluation_step, replay.batches(), self._callbacks, self._stops
            )
            if self._interruption.name:
                return
            found |= {prefix + key: value for key, value in values.items()}
        self._validated = found
        self._callbacks.call("on_validation_end", found)
        row = {"step": self._run.step, "epoch": self._run.epoch, **found}
        self._history.evaluations.append(row)

    def _stops(self) -> bool:
        return self._interruption.name is not None


class StepRecorder:
    """Writes ``history.steps``: means over the steps since the row before.

    It looks at steps that have left the device's queue, so it never waits for the newest.
    """

    def __init__(self, history: History, step: TrainStep, first_step: int) -> None:
        self._history = history
        self._step = step
        self._first_step = first_step
        self._before: Any = 0.0
        self._last_window = 0

    def start_epoch(self) -> None:
        """The sums start from zero."""
        self._before = 0.0

    def record(self, epoch: int) -> None:
        """Add a row for the steps since the last one, if there were any."""
        layout, settled = self._step.sums.layout, self._step.settled
        if settled is None or settled.num_windows == self._last_window:
            return
        now = settled.sums
        values = Values(layout, [now - self._before], self._step.sums.rows, 0, 0)
        row = {"step": self._first_step + settled.num_windows, "epoch": epoch}
        row |= {k: values[k] for k in layout.summed if isinstance(values.get(k), float)}
        self._history.steps.append(row)
        self._before, self._last_window = now, settled.num_windows


UPDATE_KEYS = ("grad_norm", "skipped_updates")
