"""One call of ``Trainer.fit``: its schedule of epochs, evaluations and records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import numpy as np

from mlx_fit.callbacks.base import CallbackList
from mlx_fit.communicator import first_known, join_rows
from mlx_fit.ending import Ending
from mlx_fit.errors import Preempted
from mlx_fit.evaluation import EvaluationStep
from mlx_fit.fit_state import BATCHES, BEGIN, DONE, EPOCH_END, MAX_STEPS, FitState
from mlx_fit.history import History
from mlx_fit.loop import Step, run_batches
from mlx_fit.passes import evaluate_pass, plain
from mlx_fit.preparing import Prepared
from mlx_fit.protocols import Run
from mlx_fit.resuming import Resumption
from mlx_fit.runtime.watch import MemoryWatch
from mlx_fit.saving import Saver
from mlx_fit.signals import Interruption
from mlx_fit.splitting import Splitters, SplittingStep
from mlx_fit.state import TrainState
from mlx_fit.step import TrainStep


class Fit:
    """Trains for the epochs of a schedule and keeps the history.

    Args:
        run: the trainer, as callbacks see it.
        given: when to do what, and the data.
        step: the training step.
        evaluation_step: the step for validation.
        callbacks: who is told.
        history: where rows go.
        interruption: tells whether a signal asked for the end.
        saver: writes checkpoints, or None.
        resumption: where to go on from, or None.
        splitters: decide on micro-batches of training and of validation where memory does not
            suffice.
    """

    def __init__(
        self,
        run: Run,
        given: Prepared,
        step: TrainStep,
        evaluation_step: EvaluationStep,
        callbacks: CallbackList,
        history: History,
        interruption: Interruption,
        saver: Saver | None,
        resumption: Resumption | None,
        splitters: Splitters,
    ) -> None:
        self._run = run
        self._schedule = given.schedule
        self._step = step
        splitter = splitters.training
        self._taking: Step = step if splitter is None else SplittingStep(step, splitter)
        self._evaluation_splitter = splitters.evaluation
        self._memory = MemoryWatch()
        self._feed = given.feed
        self._weigh = given.weigh
        self._evaluation_step = evaluation_step
        self._validation = given.validation
        self._callbacks = callbacks
        self._history = history
        self._ending = ending = Ending(run, interruption, history)
        self._saver = saver
        self._resumption = resumption
        if step.exchange is not None:
            step.exchange.votes = ending
        self._at = FitState(
            run, step, given.feed, callbacks, history, saver, self._check_loss, ending
        )

    def __call__(self) -> History:
        """Run to the end."""
        try:
            with self._memory.watching():
                return self._run_epochs()
        except Exception as error:
            typed = self._at.save_after(error)
            if typed is error:
                raise
            raise typed from error
        finally:
            self._at.recorder.close()

    def _run_epochs(self) -> History:
        run, callbacks = self._run, self._callbacks
        callbacks.call("on_train_begin", {})
        self._ending.agree()
        self._step.norms_every = callbacks.layer_norms_every
        self._plan_next_event()
        epochs, logs = self._epochs_to_run(), self._history.last
        for epoch in epochs:
            run.epoch = epoch
            logs = self._epoch(epoch)
            self._ending.agree()
            if self._ending.stops or self._ending.signal:
                break
        if self._step.exchange is not None:
            self._step.exchange.finish(run.model)
        self._at.save_end()
        if self._at.phase == BATCHES:
            self._at.recorder.note(run.epoch)  # what a signal has cut off
            self._at.recorder.write()
        self._raise_if_terminated()
        callbacks.call("on_train_end", logs)
        self._ending.agree()
        if self._ending.signal:
            self._history.stopped_by = self._ending.signal
        elif self._ending.stops and self._history.stopped_by is None:
            self._history.stopped_by = "stop_training"
        self._raise_if_terminated()
        if run.communicator.size > 1:  # what only one rank has seen, such as its memory, included
            is_known = bool(self._step.sums.layout.computes)
            rows = self._history.state_dict()
            known = first_known(run.communicator, rows if is_known else None)
            self._history.load_state_dict(known or rows)
        return self._history

    def _epochs_to_run(self) -> range:
        """The epochs that are left. A resumed run that is between epochs takes up its state."""
        schedule = self._schedule
        if self._resumption is None:
            return range(schedule.initial_epoch, schedule.epochs)
        position = self._resumption.position
        first = position["epoch"]
        if position["phase"] == DONE or first >= schedule.epochs:
            first += position["phase"] == DONE
            self._go_on(self._resumption)
            if self._ending.stops:
                return range(0)
        return range(first, schedule.epochs)

    # --- an epoch ---------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, validate if it is due, record. Empty if a signal cut it short."""
        run, callbacks, step, at = self._run, self._callbacks, self._step, self._at
        at.validated, at.phase, at.is_cut = {}, BEGIN, False
        callbacks.call("on_epoch_begin", epoch, {})
        step.start_epoch(run.info.steps_per_epoch)
        at.recorder.start_epoch()
        at.forget_kept()  # held on to, it would double the memory of training
        batches = self._batches()
        run.pace.restart()
        if at.phase != EPOCH_END:
            at.phase = BATCHES
            self._train(batches)
            if self._ending.signal and not self._feed.has_ended:
                return {}
            if at.is_cut:
                at.save()  # more steps can go on from here as if nothing had ended the epoch
            at.recorder.note(epoch)
            at.recorder.write()
            join_rows(run.communicator, step.sums)
            at.logs = self._training_logs() | self._update_logs()
            if run.communicator.size > 1:
                at.logs = self._known_logs()
            at.phase = EPOCH_END
        at.keep()  # whether trained now or taken up: what follows may be cut off, and come again
        logs = {k: v for k, v in at.logs.items() if k not in LAST_KEYS}
        if self._ending.signal:
            return {}
        if self._validation and self._schedule.validates_after(epoch):
            self._validate()
            if self._ending.signal:
                # The epoch's training is complete, its end is not: the row is kept, no hook called.
                self._history.append(epoch, at.logs)
                return {}
            callbacks.call_last("on_validation_end", at.validated)
        logs |= at.validated | {k: v for k, v in at.logs.items() if k in LAST_KEYS}
        callbacks.call_first("on_epoch_end", epoch, logs)
        at.phase = DONE
        callbacks.call_last("on_epoch_end", epoch, logs)
        self._end_epoch(epoch, logs)
        return logs

    def _train(self, batches: Iterator[Any]) -> None:
        """Take the epoch's batches, as many as there are before something ends it."""
        step = self._step
        always, displays = self._callbacks.train_batch_end()
        begin = self._callbacks.bound("on_train_batch_begin")
        if self._callbacks.runs_user_code and self._run.info.compiles:
            begin = [*begin, step.baked.look]
        run_batches(
            batches if self._weigh is None else map(self._weigh, batches),
            self._taking,
            begin,
            always,
            self._is_over,
            self._run.pace,
            displays,
            step.num_batches,
        )
        if step.window_open:
            step.close_window()
            self._taking.settle()
            self._is_over()
        step.drain()
        self._check_loss()
        self._run.pace.stop()
        self._at.is_cut = self._ending.stops and not self._feed.has_ended

    def _end_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        """Save an epoch that is complete, if it is due."""
        if self._saver is None:
            return
        self._saver.check_monitor(logs)
        if not self._at.is_cut:
            # One that was cut short was saved where it was cut.
            self._at.keep()
            if self._saver.is_due_after(epoch):
                self._at.save()

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

    def _known_logs(self) -> dict[str, Any]:
        """The epoch's logs, from a rank that has seen a batch and knows how to compute them."""
        is_known = bool(self._step.sums.layout.computes)
        found = first_known(self._run.communicator, self._at.logs if is_known else None)
        return self._at.logs if found is None else found

    # --- between batches --------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """After a batch: do what is due at this step, and say whether the epoch ends here."""
        step, ending = self._step, self._ending
        if not step.window_open and (
            step.num_windows >= self._at.next_event or perf_counter() >= ending.save_at
        ):
            self._event()
        return ending.is_now(step.window_open)

    def _event(self) -> None:
        """Record, validate or end, whatever falls on this step.

        Only what looks at this step waits for it. A row of the history does not, and losses are
        those of the steps before.
        """
        done = self._step.num_windows
        if done % self._schedule.log_every == 0:
            self._at.recorder.note(self._run.epoch)
            self._memory.look()
        if done >= self._at.next_stop or perf_counter() >= self._ending.save_at:
            self._step.wait()  # before the clock of the pass is stopped: it is training
            with self._run.pace.paused():
                self._stop_over(done)
        else:
            self._check_loss()
            self._plan_next_event()

    def _stop_over(self, done: int) -> None:
        """Validate, save or end, after a step that is finished."""
        schedule = self._schedule
        self._check_loss()
        every = schedule.validates_every
        if every and self._validation and done % every == 0:
            if not self._ending.signal:
                self._at.keep()  # averages may stand in for the weights while it evaluates
                self._validate()
            if self._ending.signal:
                return  # the evaluation stays due, for the run that goes on
            validated = self._at.validated
            self._at.forget_kept()
        else:
            validated = None
        if schedule.max_steps is not None and done >= schedule.max_steps:
            self._ending.decide(MAX_STEPS)
        self._plan_next_event()
        if validated is not None:
            self._callbacks.call_last("on_validation_end", validated)
        is_late = perf_counter() >= self._ending.save_at
        is_saved = False
        if self._saver is not None and self._saver.is_due(done, is_late):
            self._at.save()
            is_saved = True
        if is_saved or validated is not None:  # user code was told of it
            self._step.baked.look()

    def _plan_next_event(self) -> None:
        schedule, done = self._schedule, self._step.num_windows
        marks: list[float] = [math.inf]
        if schedule.validates_every and self._validation:
            marks.append((done // schedule.validates_every + 1) * schedule.validates_every)
        if schedule.max_steps is not None and schedule.max_steps > done:
            marks.append(schedule.max_steps)
        if self._run.quiet_on_nonfinite or schedule.log_every == 1:  # a bad loss ends it at once
            marks.append(done + 1)
        if self._saver is not None and (mark := self._saver.next_step(done)) is not None:
            marks.append(mark)
        self._at.next_stop = min(marks)
        next_row = (done // schedule.log_every + 1) * schedule.log_every
        self._at.next_event = min(next_row, self._at.next_stop)

    def _check_loss(self) -> None:
        """Raise for a non-finite loss that the step has noted since."""
        bad = self._step.first_bad
        if bad is None:
            return
        if self._run.quiet_on_nonfinite:
            self._ending.decide("TerminateOnNaN")
            return
        raise self._step.bad_loss(self._at.first_step + bad[0], self._run.epoch)

    def _raise_if_terminated(self) -> None:
        if self._ending.signal == "SIGTERM":
            self._history.stopped_by = "SIGTERM"
            step = self._run.step
            raise Preempted(f"SIGTERM ended the run after step {step}.", step=step)

    # --- going on from a checkpoint ---------------------------------------------------------------

    def _batches(self) -> Iterator[Any]:
        """The epoch's batches; those that are left, in the epoch in which a resumed run goes on."""
        resumption = self._resumption
        if resumption is None or resumption.is_taken_up:
            return self._feed.epoch()
        self._go_on(resumption)
        position = resumption.position
        if position["phase"] == BEGIN:
            return self._feed.epoch()
        self._at.phase = position["phase"]
        is_over = self._at.phase == BATCHES and self._is_over()
        return iter(()) if is_over else self._feed.rest()

    def _go_on(self, resumption: Resumption) -> None:
        """Take up a checkpoint's state, then see what is due and whether the limit is reached."""
        at, max_steps = self._at, self._schedule.max_steps
        at.take_up(resumption)
        self._ending.agree()
        is_event_due = at.next_event == 0
        self._plan_next_event()
        if is_event_due:
            at.next_event = at.next_stop = 0
        if max_steps is not None and self._step.num_windows >= max_steps:
            self._ending.decide(MAX_STEPS)

    def state(self) -> TrainState:
        """Everything that a fresh process needs to go on from here. Host synchronisation.

        Raises:
            CheckpointError: the data cannot tell where it is.
        """
        return self._at.state()

    def telling_of_a_save(self) -> AbstractContextManager[None]:
        """Callbacks hear of what is written inside, by one of them for instance."""
        return self._at.telling_of_a_save()

    # --- validation -------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Evaluate every validation set; leaves no trace on weights, modes or the random key."""
        found: dict[str, Any] = {}
        for name, replay in self._validation.items():
            prefix = f"val_{name}_" if name else "val_"
            values = evaluate_pass(
                self._run,
                self._evaluation_step,
                replay.batches(),
                self._callbacks,
                self._stops,
                self._evaluation_splitter,
            )
            self._ending.agree()
            if self._ending.signal:
                return
            found |= {prefix + key: value for key, value in values.items()}
        self._at.validated, self._at.validated_at = found, self._step.num_windows
        self._callbacks.call_first("on_validation_end", found)
        row = {"step": self._run.step, "epoch": self._run.epoch, **found}
        self._history.evaluations.append(row)

    def _stops(self) -> bool:
        return self._ending.signal is not None


UPDATE_KEYS = ("grad_norm", "layer_grad_norms", "skipped_updates")
LAST_KEYS = ("learning_rate", *UPDATE_KEYS)  # of an epoch's values these come last
