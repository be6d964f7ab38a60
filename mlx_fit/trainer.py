"""The trainer: a model, an optimizer and an objective; ``fit``, ``evaluate``, ``predict``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.arguments import (
    as_batch,
    check_trainer,
    checked_steps,
    evaluation_source,
)
from mlx_fit.batch import join_outputs
from mlx_fit.callbacks.base import Callback, CallbackList
from mlx_fit.callbacks.history import HistoryRecorder
from mlx_fit.callbacks.progress import progress, resolve_verbose
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.communicator import ALONE, Exchange, first_known, reporting
from mlx_fit.data.data_module import torn_down
from mlx_fit.data.feed import Replay
from mlx_fit.errors import ConfigurationError, OutOfMemoryError, from_runtime_error
from mlx_fit.fit import Fit
from mlx_fit.foresight import Foresight
from mlx_fit.history import History
from mlx_fit.keywords import known_only
from mlx_fit.logs import Logs
from mlx_fit.modes import training_mode
from mlx_fit.objective import Objective, as_objective, direction_of
from mlx_fit.pass_steps import PassSteps
from mlx_fit.passes import evaluate_pass, pass_info, plain, predict_pass, seen_as
from mlx_fit.plan import MemoryPlan
from mlx_fit.precision import Precision, initial_scale
from mlx_fit.preparing import Order, Prepared, prepare_fit, run_info, trainer_arguments
from mlx_fit.protocols import Communicator, RunInfo
from mlx_fit.rates import OptimizerSetup
from mlx_fit.resuming import Resumption, prepare, trusting
from mlx_fit.runtime.device import DeviceConfig
from mlx_fit.signals import Interruption, watched
from mlx_fit.splitting import Splitters, SplittingStep
from mlx_fit.state import without_arrays
from mlx_fit.stateful import Stateful
from mlx_fit.step import StepOptions, TrainStep
from mlx_fit.summary import print_summary
from mlx_fit.timing import Schedule


class Trainer(Stateful):
    """Trains an ``mlx.nn.Module``.

    Args:
        model: the model; ``model(x)``, or ``model(**x)`` where the inputs are a dict.
        optimizer: any MLX optimizer. Schedules follow its count of applied updates.
        loss: a name (``"cross_entropy"``, ``"mse"``, ...), a
            :class:`~mlx_fit.losses.Loss`, ``f(outputs, targets)`` returning per-example losses of
            shape ``(batch, ...)`` or a scalar mean, or a dict of these by output name.
        metrics: names, metrics or functions ``f(outputs, targets)``; for several outputs a list
            (computed for each) or a dict by output name.
        objective: instead of ``loss``: ``f(model, batch)`` returning a scalar,
            ``(scalar, {name: scalar})`` or :class:`~mlx_fit.Sums`.
        batch_size: rows of a batch where this library does the batching.
        gradient_accumulation: batches to an update. The update is that of one batch of them all.
        clip_norm: largest global norm of the averaged gradient.
        clip_value: largest size of any of its components.
        precision: ``"float32"``, ``"mixed_bfloat16"``, ``"mixed_float16"`` or ``"bfloat16"``. Half
            precision casts weights and the inputs of ``model(...)``; an objective that calls parts
            of the model by themselves casts their inputs.
        compile: False runs the same step eagerly, for debugging.
        device_config: device and memory limits while this trainer computes.
        on_oom: what a batch that does not fit into memory does: ``"raise"``
            :class:`~mlx_fit.OutOfMemoryError`, or ``"split"``: it is computed as micro-batches of
            half the rows, and of half of these if need be, see :attr:`micro_batch_size`.
        nonfinite: what a loss of NaN or infinity does: ``"raise"``
            :class:`~mlx_fit.NonFiniteLossError`, ``"skip"`` the batch, or ``"ignore"``.
        seed: fixes the order of data and, when the first fit starts, MLX's random key.

    Everything that is reported is a weighted sum, divided once: sum(w * l) / sum(w) over rows,
    micro-batches and batches. Rows without weights weigh 1.

    Example:
        >>> import mlx.nn as nn, mlx.optimizers as optim, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
        >>> y = (x.sum(1) > 0).astype(np.int32)
        >>> model = nn.Linear(4, 2)
        >>> trainer = Trainer(model, optim.Adam(0.1), "cross_entropy", ["accuracy"], seed=0)
        >>> history = trainer.fit((x, y), epochs=5, verbose=0)
        >>> trainer.evaluate((x, y), verbose=0)["accuracy"] > 0.9
        True
    """

    @known_only
    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer | None = None,
        loss: Any = None,
        metrics: Any = (),
        *,
        objective: Objective | Callable[[Any, Any], Any] | None = None,
        batch_size: int = 32,
        gradient_accumulation: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: str = "float32",
        compile: bool = True,
        device_config: DeviceConfig | None = None,
        on_oom: str = "raise",
        nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        check_trainer(model, optimizer, batch_size, device_config, seed)
        super().__init__(model, optimizer, seed)
        self.batch_size = batch_size
        self.device_config = device_config or DeviceConfig()
        self.info = RunInfo()
        self.stop_training = False
        self.quiet_on_nonfinite = False
        self.stop_evaluating = False
        self.stop_predicting = False
        self._objective = as_objective(loss, metrics, objective)
        self._options = StepOptions(
            gradient_accumulation,
            clip_norm,
            clip_value,
            Precision.get(precision),
            compile,
            nonfinite,
            on_oom,
        )
        self._splitters = Splitters(on_oom == "split")
        self._options.precision.prepare(model)
        self._setup = OptimizerSetup(optimizer)
        self._arguments = trainer_arguments(self._options, loss, metrics, objective)
        # Lazy arrays belong to the thread that made them; the fit may run in another.
        mx.eval(model.state, optimizer.state if optimizer is not None else [])
        self._scaling = initial_scale() if self._options.precision.scales_loss else {}
        self._warns_of_promotion = precision.startswith("mixed")
        # What a trainer of several ranks puts in their place: who makes an update together, and how
        # all of them start with the same.
        self._make_exchange: Callable[[StepOptions, bool], Exchange | None] = _no_exchange
        self._align: Callable[[], None] = _nothing_to_align
        self._own_callbacks: list[Callback] = []
        has_limit = self.device_config.memory_limit is not None
        self._pass_steps = PassSteps(self._options, has_limit)

    # --- training ---------------------------------------------------------------------------------

    @known_only
    def fit(
        self,
        train: Any,
        val: Any = None,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        initial_epoch: int = 0,
        validation_split: float = 0.0,
        validation_freq: int | list[int] | str = 1,
        validation_steps: int | None = None,
        class_weight: Mapping[Any, float] | None = None,
        shuffle: bool = True,
        callbacks: Any = (),
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: str | CheckpointPolicy = "epoch",
        resume: bool | str | Path = False,
        log_every: int = 10,
        verbose: int | str = "auto",
    ) -> History:
        """Train, validate, and return the history.

        Args:
            train: a tuple ``(x, y[, weights])`` of arrays; a list of batches; a dataset of rows
                (``__len__`` and ``__getitem__``); a loader or any iterable of batches; or a
                function that returns an iterator, called once per epoch.
            val: data of the same kinds, or a dict of several sets, logged as ``val_<set>_<key>``.
                An iterator is read once, and its batches are kept for the next evaluations.
            epochs: index after the last epoch: ``initial_epoch=3, epochs=6`` runs 3, 4 and 5.
            max_steps: ends the fit after so many updates, if the epochs have not ended it before.
            steps_per_epoch: batches of an epoch; passes over the data are joined to fill it.
            initial_epoch: the first epoch, 0-based.
            validation_split: share of the rows, the last ones, that is kept for validation.
            validation_freq: every so many epochs; a list of epochs, from 1; or ``"500 steps"``.
            validation_steps: largest number of batches of a validation.
            class_weight: class -> factor of the weights of its rows; never used in validation.
            shuffle: whether arrays and datasets are shuffled each epoch.
            callbacks: a callback or a list of them.
            checkpoint_dir: folder for checkpoints of everything, from which a run that was killed
                goes on bit for bit. The end of the fit is always saved.
            checkpoint_every: ``"epoch"``, ``"500 steps"``, ``"10 minutes"``, or a
                :class:`CheckpointPolicy`, which says also how many are kept.
            resume: ``"auto"`` goes on from the newest whole checkpoint in ``checkpoint_dir`` if
                there is one, True insists on one, a path is that of a checkpoint. False starts
                anew, and refuses a folder that holds checkpoints.
            log_every: steps between rows of ``history.steps``, and between looks at the loss: one
                that is not finite is found at most so many steps late, with 1 at once.
            verbose: 0 nothing, 1 a bar, 2 a line per epoch; ``"auto"`` is 1 on a terminal or in a
                notebook, 2 elsewhere.

        Raises:
            ConfigurationError: an argument cannot work.
            DataError: the data cannot be used, or ended early.
            NonFiniteLossError: the loss became NaN or infinite (``nonfinite="raise"``).
            OutOfMemoryError, DeviceError: the device failed.
            CheckpointError: a checkpoint could not be written, or the one to resume is damaged or
                does not fit.
            ResumeError: there is nothing to resume, or the data or the seed is another.
            Preempted: SIGTERM arrived; a ``SystemExit`` of code 143.
        """
        schedule = Schedule(
            *(epochs, initial_epoch, max_steps, steps_per_epoch),
            *(validation_freq, validation_steps, log_every),
        )
        order = Order(self._seed, self._order_seed, self._num_passes)
        with reporting(self.communicator):
            given = prepare_fit(
                *(train, val, schedule, order, self._objective, self.communicator),
                batch_size=self.batch_size,
                validation_split=validation_split,
                class_weight=class_weight,
                shuffle=shuffle,
                checkpoint_dir=checkpoint_dir,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
        interruption = Interruption()
        with torn_down(train, "fit"), training_mode(self.model), watched(interruption):
            self._seed_once()
            with reporting(self.communicator):
                self._align()
            history = self._start_run(given, resolve_verbose(verbose))
            resumption = self._resume(given)
            callback_list = self._watchers(callbacks, history)
            with self._computing(callback_list, trains=True):
                self._fit = Fit(
                    self,
                    given,
                    self._new_train_step(resumption),
                    self._pass_steps.new_evaluation(self.model, self._require_objective()),
                    callback_list,
                    history,
                    interruption,
                    given.saver(self),
                    resumption,
                    self._splitters,
                )
                return self._run_fit(given)

    @known_only
    def train(
        self,
        train_dataset: Any,
        val_dataset: Any = None,
        epochs: int = 1,
        checkpoint_dir: str | Path | None = None,
        callbacks: Any = (),
    ) -> History:
        """The same as :meth:`fit`, by the name that earlier MLX training code used."""
        return self.fit(
            train_dataset,
            val_dataset,
            epochs=epochs,
            checkpoint_dir=checkpoint_dir,
            callbacks=callbacks,
        )

    def train_on_batch(self, x: Any, y: Any = None, weights: Any = None) -> dict[str, Any]:
        """One update from one batch, given as ``(x, y)`` or as separate arguments.

        Returns:
            The loss and metrics of this batch.
        """
        batch = as_batch(x, y, weights)
        with training_mode(self.model), self._computing(None, trains=True):
            step = self._train_step or self._new_train_step()
            if step.optimizer is not self.optimizer or step.model is not self.model:
                step = self._new_train_step()
            step.start_epoch(num_batches=1)
            splitter = self._splitters.training
            taking = step if splitter is None else SplittingStep(step, splitter)
            taking(batch)
            taking.settle()
            step.drain()
            if step.first_bad is not None:
                raise step.bad_loss(self.step, self.epoch)
            logs = {key: plain(value) for key, value in Logs(step.sums).items()}
            # A rank that had no rows does not know what they add up to.
            return first_known(self.communicator, logs or None) or logs

    # --- evaluation and prediction ----------------------------------------------------------------

    @known_only
    def evaluate(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Any = (),
        verbose: int | str = "auto",
    ) -> dict[str, Any]:
        """Loss and metrics over data, each row once. Nothing is updated.

        Args:
            data: as for :meth:`fit`.
            batch_size: rows of a batch; default the trainer's.
            steps: largest number of batches.
            callbacks: told of ``on_test_*``.
            verbose: as for :meth:`fit`.

        Returns:
            ``{"loss": ..., <metric>: ...}``. A key over which no weight was counted is left out.
        """
        source = evaluation_source(data, *self._evaluated(batch_size))
        replay, verbose = Replay(source, checked_steps(steps)), resolve_verbose(verbose)
        self.stop_evaluating = False
        info = pass_info("evaluate", source, steps, verbose)
        with torn_down(data, "test"), seen_as(self, info):
            watchers, params = [callbacks, progress(verbose)], {"verbose": verbose}
            callback_list = CallbackList(watchers, self, params, self._is_first)
            with self._computing(callback_list):
                return evaluate_pass(
                    self,
                    self._pass_steps.evaluation(self.model, self._require_objective()),
                    replay.batches(),
                    callback_list,
                    lambda: self.stop_evaluating,
                    self._splitters.evaluation,
                )

    def test_on_batch(self, x: Any, y: Any = None, weights: Any = None) -> dict[str, Any]:
        """Loss and metrics of one batch, given as ``(x, y)`` or as separate arguments."""
        return self.evaluate([as_batch(x, y, weights)], verbose=0)

    @known_only
    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Any = (),
        verbose: int | str = "auto",
    ) -> Any:
        """The model's outputs for all rows, in order, as NumPy arrays (floats as float32).

        Args:
            data: inputs ``x``, or data as for :meth:`fit`, whose targets and weights are ignored.
            batch_size: rows of a batch; default the trainer's.
            steps: largest number of batches.
            callbacks: told of ``on_predict_*``.
            verbose: as for :meth:`fit`.

        Returns:
            A tree like the model's outputs, each leaf of shape ``(rows, ...)``.
        """
        options = {"batch_size": batch_size, "steps": steps, "callbacks": callbacks}
        with torn_down(data, "predict"):
            parts = [*self.predict_batches(data, verbose=verbose, **options)]
        return join_outputs(parts, "Use predict_batches, which gives them batch by batch.")

    @known_only
    def predict_batches(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Any = (),
        verbose: int | str = "auto",
    ) -> Iterator[Any]:
        """Like :meth:`predict`, batch by batch: memory for one batch of outputs only."""
        source = evaluation_source(data, *self._evaluated(batch_size), stage="predict")
        replay, verbose = Replay(source, checked_steps(steps)), resolve_verbose(verbose)
        watchers, params = [callbacks, progress(verbose)], {"verbose": verbose}
        callback_list = CallbackList(watchers, self, params, self._is_first)
        self.stop_predicting = False
        return predict_pass(
            self,
            self._pass_steps.prediction(self.model),
            replay.batches(),
            callback_list,
            pass_info("predict", source, steps, verbose),
            partial(self._computing, callback_list),
            self._splitters.prediction,
        )

    def predict_on_batch(self, x: Any) -> Any:
        """The model's outputs for one batch, ``x`` or ``(x, y)``, as NumPy arrays.

        Of several ranks only the one that calls it computes; nothing is exchanged.
        """
        batch = x if isinstance(x, (tuple, list)) else (x,)
        ranks, self.communicator = self.communicator, ALONE
        try:
            return next(iter([*self.predict_batches([batch], verbose=0)]))
        finally:
            self.communicator = ranks

    # --- what it is -------------------------------------------------------------------------------

    def summary(self) -> None:
        """Print the layers with their parameters, how many are trained, and their bytes."""
        print_summary(self.model)

    def plan(self, batch: Any) -> MemoryPlan:
        """What a training step of a batch takes of memory, measured on parts of it.

        Steps of a few rows, up to a quarter of the batch, are run and undone; then the whole is
        predicted. Weights, optimizer state, buffers, random key and counters are as before.

        Args:
            batch: ``x``, ``(x, y)`` or ``(x, y, weights)`` as :meth:`fit` gets it; its rows are
                those of a micro-batch, so with gradient accumulation it is one batch of a window.

        Returns:
            The plan. ``print(trainer.plan(batch))`` shows it as a table.

        Raises:
            ConfigurationError: there is no loss or no optimizer.
            DataError: it is no batch, has no rows, or its first rows weigh nothing.

        Example:
            >>> import mlx.nn as nn, mlx.optimizers as optim, numpy as np
            >>> trainer = Trainer(nn.Linear(8, 2), optim.Adam(0.1), "cross_entropy")
            >>> plan = trainer.plan((np.zeros((64, 8), np.float32), np.zeros(64, np.int32)))
            >>> plan.fits, plan.parts["weights"]
            (True, 72)
        """
        with training_mode(self.model), self._computing(None):
            return self._foresight().plan(batch)

    @property
    def micro_batch_size(self) -> int:
        """Rows that are computed at a time: a batch, or less after memory did not suffice for one.

        It is kept for the rest of the run, and in checkpoints. Evaluation has a size of its own.
        Of several ranks each computes so many at a time, all the same.
        """
        return self._splitters.rows or self.info.batch_size or self.batch_size

    # --- what callbacks see -----------------------------------------------------------------------

    def direction(self, key: str) -> bool | None:
        """Whether a higher value of a logged key is better; None where nobody declared it."""
        return direction_of(self._objective, key, self.info.validation_sets)

    def stop_on_nonfinite(self) -> None:
        """End training quietly, instead of raising, when the loss becomes non-finite.

        Raises:
            ConfigurationError: this trainer has another policy than ``nonfinite="raise"``.
        """
        if self._options.nonfinite != "raise":
            raise ConfigurationError(
                f"TerminateOnNaN has nothing to end with nonfinite={self._options.nonfinite!r}; "
                "make the trainer with nonfinite='raise', or leave the callback out."
            )
        self.quiet_on_nonfinite = True

    def request_stop(self, reason: str) -> None:
        """End training after the current batch's update; validation and epoch end still run."""
        self.stop_training = True
        if self.history is not None and self.history.stopped_by is None:
            self.history.stopped_by = reason

    @property
    def _is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.communicator.rank == 0

    def _evaluated(self, batch_size: int | None) -> tuple[int, str, Communicator]:
        """How data for an evaluation is batched, what it is called, and who shares it."""
        return self.batch_size if batch_size is None else batch_size, "data", self.communicator

    # --- preparation ------------------------------------------------------------------------------

    def _watchers(self, callbacks: Any, history: History) -> CallbackList:
        """The user's callbacks first, then history, then progress."""
        own = [*self._own_callbacks, HistoryRecorder(history), progress(self.info.verbose)]
        return CallbackList([callbacks, own], self, history.params, self._is_first)

    def _run_fit(self, given: Prepared) -> History:
        assert self._fit is not None
        try:
            history = self._fit()
            try:
                self._last_fit = without_arrays(self._fit.state())
            except Exception as error:  # in a callback's state_dict; the fit itself has succeeded
                self._last_fit = None
                warnings.warn(
                    f"A later save() will hold nothing of this fit but its weights: {error!r}",
                    stacklevel=4,
                )
            return history
        finally:
            self._fit = None
            given.feed.close()  # a callback's traceback must not keep workers alive
            self._num_passes = given.feed.start_epoch + given.feed.passes_finished

    def _resume(self, given: Prepared) -> Resumption | None:
        """Go to where a checkpoint was taken, if there is one."""
        if given.found is None:
            return None
        resumption = prepare(
            *given.found,
            model=self.model,
            setup=self._setup,
            scaling=self._scaling,
            feed=given.feed,
            arguments=self.info.arguments,
        )
        self._take_counters(given.found[1].trainer)
        if resumption is not None:
            assert self.history is not None
            with trusting(resumption.path):
                self._steps_before = resumption.position["first_step"]
                self.history.load_state_dict(resumption.state.history or {})
        return resumption

    def _seed_once(self) -> None:
        if self._seed is not None and not self._is_seeded:
            mx.random.seed(self._seed)
            self._is_seeded = True

    def _start_run(self, given: Prepared, verbose: int) -> History:
        self.stop_training = False
        self.quiet_on_nonfinite = False
        if self._setup.optimizer is not self.optimizer:
            self._setup = OptimizerSetup(self.optimizer)
        settings = self._arguments | self._setup.settings
        self.info = info = run_info(given, self._options, verbose, settings)
        params = {"verbose": verbose, "epochs": info.epochs, "steps": info.steps_per_epoch}
        self.history = History(params, self.direction)
        return self.history

    def _require_objective(self) -> Objective:
        if self._objective is None:
            raise ConfigurationError(
                "This trainer has no loss: give Trainer(model, optimizer, loss=...) or objective=."
            )
        return self._objective

    def _foresight(self) -> Foresight:
        if self.optimizer is None:
            raise ConfigurationError(
                "This trainer has no optimizer: give Trainer(model, optimizer, ...)."
            )
        has_limit = self.device_config.memory_limit is not None
        objective = self._require_objective()
        size = self.communicator.size
        return Foresight(self.model, self.optimizer, objective, self._options, has_limit, size)

    def _new_train_step(self, resumption: Resumption | None = None) -> TrainStep:
        self._drop_train_step()
        guard = self._foresight()
        self._train_step = TrainStep(
            self.model,
            self.optimizer,
            self._require_objective(),
            self._options,
            self._scaling,
            self._warns_of_promotion,
            self._make_exchange(self._options, bool(self._scaling)),
        )
        self._train_step.guard = guard
        self._warns_of_promotion = False
        if resumption is not None:
            self._train_step.num_windows = resumption.num_windows
        return self._train_step

    @contextmanager
    def _computing(self, callbacks: CallbackList | None, trains: bool = False) -> Iterator[None]:
        """On the configured device; types MLX's errors and tells the callbacks of any.

        After an error while training the training step, which may be half-way, is let go of.
        """
        try:
            with self.device_config.applied():
                yield
        except BaseException as error:
            state = "" if trains else "Nothing was updated."
            typed = from_runtime_error(error, batch_size=self.batch_size, state=state)
            self.communicator.report(typed or error)
            if trains:
                if isinstance(typed, OutOfMemoryError) and self._train_step is not None:
                    self._train_step.recover()
                self._drop_train_step()
                self._scaling = initial_scale() if self._scaling else {}
            if callbacks is not None:
                callbacks.report(typed or error)
            if typed is not None:
                raise typed from error
            raise


def _no_exchange(options: StepOptions, scales_loss: bool) -> Exchange | None:
    """One process has nobody to exchange with."""
    return None


def _nothing_to_align() -> None:
    """One process starts with what it has."""
