"""The compiled functions: one batch in, gradients, update and the sums that logs are made of.

This is the only place that calls ``mx.compile``. What MLX leaves to its caller is done here: the
state is captured as inputs and outputs, the optimizer is initialised first, the functions are
rebuilt when what is trainable changes, and an exception while tracing leaves no tracer behind.

May import: ``objective``.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_fit import gradients as grad
from mlx_fit._tree import RandomState, named_arrays, restore, select, snapshot
from mlx_fit.batch import describe, signature, to_mlx
from mlx_fit.errors import ConfigurationError
from mlx_fit.logs import Sums, add, divide, nonzero_total, total
from mlx_fit.objective import Objective, Terms
from mlx_fit.precision import POLICIES, Precision, next_scale, warn_of_promotion

MAX_SHAPES = 32
MAX_IN_FLIGHT = 2  # steps that wait for the device, where it is not the CPU


@dataclass(frozen=True)
class StepOptions:
    """How a batch becomes an update.

    Attributes:
        gradient_accumulation: batches to an update.
        clip_norm, clip_value: clipping of the averaged gradient; None: none.
        precision: the policy of :mod:`mlx_fit.precision`.
        compile: False runs the same functions eagerly.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"``.
    """

    gradient_accumulation: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    precision: Precision = POLICIES["float32"]
    compile: bool = True
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        count = self.gradient_accumulation
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigurationError(
                f"gradient_accumulation={count!r}; expected a whole number of batches, at least 1."
            )
        for name in ("clip_norm", "clip_value"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ConfigurationError(f"{name}={limit!r}; expected a positive number or None.")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ConfigurationError("Give clip_norm= or clip_value=, not both.")
        if self.nonfinite not in ("raise", "skip", "ignore"):
            raise ConfigurationError(
                f"nonfinite={self.nonfinite!r}; expected 'raise', 'skip' or 'ignore'."
            )

    @property
    def masks_bad_batches(self) -> bool:
        """Whether a batch with non-finite loss or gradients is undone inside the step."""
        return self.nonfinite == "skip" or self.precision.scales_loss


class Traced:
    """A function compiled over captured state, whose failing trace leaves that state whole.

    Args:
        function: what to compile.
        state: containers whose arrays the function reads; the random state is the last of them.
        outputs: those of them that it writes; the others are as before after every call.
        compile: False calls the function as it is.

    Attributes:
        function: the compiled function, to be called directly for keys in :attr:`seen`.
        seen: keys that were traced before. Stays empty without compilation, where every call may
            raise in the user's code.
        num_traces: how often the function was traced.
    """

    def __init__(
        self, function: Callable[..., Any], state: list[Any], outputs: list[Any], compile: bool
    ) -> None:
        self.num_traces = 0
        self.seen: set[Any] = set()
        self._state = state
        self._compiles = compile
        self._keeps = len(outputs) < len(state)

        def counted(*args: Any) -> Any:
            self.num_traces += 1
            return function(*args)

        self.function = mx.compile(counted, inputs=state, outputs=outputs) if compile else counted

    def __call__(self, key: Any, *args: Any) -> Any:
        """Call the function for a key that may be new: MLX traces, and user code may raise."""
        if key in self.seen:
            return self.function(*args)
        saved, random_state = [snapshot(part) for part in self._state[:-1]], RandomState()
        try:
            results = self.function(*args)
        except BaseException:
            self._put_back(saved)
            random_state.restore()
            raise
        if self._keeps:
            self._put_back(saved)
        if self._compiles:
            self.seen.add(key)
        return results

    def _put_back(self, saved: list[Any]) -> None:
        for part, kept in zip(self._state[:-1], saved, strict=True):
            restore(part, kept)


class Settled:
    """What a finished step knew. Reading it copies from the device but waits for nothing.

    Attributes:
        sums: the packed running sums, float64.
        num_windows: windows closed by then, over the whole fit.
        bad_window: the first of them (1-based) with a non-finite loss, 0 if there was none.
        bad_loss: its loss.
    """

    def __init__(self, running: mx.array, watch: mx.array) -> None:
        self.sums = np.array(running, dtype=np.float64).sum(0)
        windows, first, self.bad_loss = np.array(watch).tolist()
        self.num_windows, self.bad_window = int(windows), int(first)


class TrainStep:
    """One batch of training: ``step(batch)``.

    Built for one fit, over the model and optimizer as they are then. A window is the
    ``gradient_accumulation`` batches that make one update.

    Attributes:
        sums: what the epoch has added up so far.
        window_open: whether batches wait for their update.
        num_windows: windows closed so far.
        num_skipped: windows of total weight 0 that were not even dispatched, in this epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        scaling: dict[str, mx.array],
        logs_grad_norm: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.options = options
        self.sums = Sums()
        self.window_open = False
        self.num_windows = 0
        self.num_skipped = 0
        self._num_batches_left = -1
        self._scaling = scaling
        self._is_fused = options.gradient_accumulation == 1
        self._logs_grad_norm = logs_grad_norm or options.clip_norm is not None
        # [windows so far, first bad window (0: none), its loss]: the watch on non-finite losses
        self._watch = mx.array([0.0, 0.0, float("nan")])
        self._window: list[Any] = []
        self._num_in_window = 0
        self._weight_on_host = True
        self._masks_weight = (
            False  # set while tracing: only the device knows whether a batch counts
        )
        self._host_batch: Any = None
        self._in_flight: deque[tuple[mx.array, mx.array]] = deque()
        self._settled: tuple[mx.array, mx.array] | None = None
        self._is_async = mx.default_device().type != mx.DeviceType.cpu
        self._shapes: dict[Any, str] = {}
        self._old_traces = 0
        self._build()

    # --- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        _check_trainables(self.model)
        # First, or the state's arrays appear during the first call and MLX traces twice.
        self.optimizer.init(self.model.trainable_parameters())
        self._built_for = _trainables(self.model)
        self._state = [self.model.state, self.optimizer.state, self._scaling, mx.random.state]
        compiles = self.options.compile
        batch_function = self._update_from if self._is_fused else self._accumulate_from
        self._batch = Traced(batch_function, self._state, self._state, compiles)
        self._flush = Traced(self._update_from_window, self._state, self._state, compiles)
        self._scheduled = [o.state for o in optimizers_of(self.optimizer) if has_schedule(o)]
        self._known_rates = [state["learning_rate"] for state in self._scheduled]

    def _rebuild(self) -> None:
        self._old_traces = self.num_traces
        self._build()

    @property
    def num_traces(self) -> int:
        """How often the functions of this step were traced."""
        return self._old_traces + self._batch.num_traces + self._flush.num_traces

    def start_epoch(self, num_batches: int | None = None) -> None:
        """Forget the sums of the epoch before; rebuild if something was frozen or thawed since.

        Args:
            num_batches: batches of this epoch, where it is known: the last of them closes its
                window. Otherwise the caller calls :meth:`close_window` when they have ended.
        """
        self.sums.restart()
        self._num_batches_left = -1 if num_batches is None else num_batches
        self.num_skipped = 0
        if _trainables(self.model) != self._built_for:
            self._rebuild()

    # --- a batch, on the host ---------------------------------------------------------------------

    def __call__(self, batch: Any) -> None:
        """Take one batch: its gradients and, if it is the last of its window, the update."""
        weight = self.objective.host_weight(batch)
        if weight is None and self._weight_on_host:
            self._weight_on_host = False
            self._rebuild()
        if weight != 0.0:
            if self._scheduled:
                self._check_rates()
            arrays, sums = to_mlx(batch), self.sums
            key = (signature(arrays), len(self._window))
            if key in self._batch.seen:
                results = self._batch.function(arrays, self._window, sums.running, self._watch)
            else:
                results = self._first_call(key, batch, arrays)
            self._window, sums.running, self._watch, sums.batch, rows = results
            if rows:
                sums.rows.append(rows)
            if self._scheduled:
                self._known_rates = [state["learning_rate"] for state in self._scheduled]
        self._num_batches_left -= 1
        if self._is_fused and weight != 0.0:
            self.num_windows += 1  # in line: the usual case, and calls are counted
        else:
            self._end_batch(weight)

    def _end_batch(self, weight: float | None) -> None:
        """Count the batch, and close its window if it was the last of it."""
        if self._is_fused:
            self.num_windows += 1
            self._skip_window()
            return
        self._num_in_window += 1
        self.window_open = self._num_in_window < self.options.gradient_accumulation
        if not self.window_open or self._num_batches_left == 0:
            self.close_window()

    def _first_call(self, key: Any, host_batch: Any, batch: Any) -> Any:
        """Meet a batch of a new shape: MLX traces, and bugs in user code show."""
        self._host_batch = host_batch
        warn_of_many_shapes(self._shapes, key[0], batch)
        try:
            if self._old_traces + self._batch.num_traces == 0:
                self._warn_of_promotion(batch)
            return self.sums.growing(
                lambda: self._batch(key, batch, self._window, self.sums.running, self._watch)
            )
        except Exception as error:
            error.add_note(f"In the training step, for the batch {describe(batch)}.")
            raise
        finally:
            self._host_batch = None

    def close_window(self) -> None:
        """Update the weights from the accumulated batches of the window, however many there are."""
        if self._window:
            self.sums.running, self._watch = self._flush(
                0, self._window, self.sums.running, self._watch
            )
            self._window = []
        else:
            self._skip_window()
        self._num_in_window = 0
        self.num_windows += 1
        self.window_open = False

    def _skip_window(self) -> None:
        """Count a window whose weight the host knows to be 0; nothing was dispatched."""
        self.num_skipped += 1
        self._watch = self._watch + mx.array([1.0, 0.0, 0.0])

    def _check_rates(self) -> None:
        for state, known in zip(self._scheduled, self._known_rates, strict=True):
            if state["learning_rate"] is not known:
                raise ConfigurationError(
                    "optimizer.learning_rate was assigned, but the optimizer has a schedule, which "
                    "would overwrite it at the next update. Give the optimizer a plain number, or "
                    "put the change into the schedule."
                )

    def settle(self) -> None:
        """Evaluate what this step changed: at once on the CPU, two steps behind elsewhere."""
        sums = self.sums
        live = self._state, self._window, self._watch, sums.running, sums.batch, sums.rows.newest
        if not self._is_async:
            mx.eval(*live)  # host synchronisation, the one of a step
            self._settled = sums.running, self._watch
            return
        mx.async_eval(*live)
        self._in_flight.append((sums.running, self._watch))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._settled = self._in_flight.popleft()
            mx.eval(*self._settled)  # host synchronisation with the step before the last

    def drain(self) -> None:
        """Wait for every step that is in flight."""
        self._in_flight.clear()
        self._settled = self.sums.running, self._watch
        mx.eval(*self._settled)  # host synchronisation, once an epoch

    @property
    def settled(self) -> Settled | None:
        """The newest step that the device has finished, None before the first."""
        return None if self._settled is None else Settled(*self._settled)

    # --- a batch, on the device: what is compiled -------------------------------------------------

    def _update_from(
        self, batch: Any, window: list[Any], running: mx.array, watch: mx.array
    ) -> Any:
        """Gradients and update in one function: a window of one batch."""
        terms, gradients, is_good = self._gradients(batch)
        conditions = [] if is_good is None else [is_good]
        if self._masks_weight:
            conditions.append(mx.array(terms.weight) > 0)
        overflowed = None if is_good is None else mx.logical_not(is_good)
        entries = self._update(gradients, conditions, overflowed)
        vector = self._pack(terms, is_good, entries)
        watch = self._watch_loss(watch, terms.mean, ends_window=True)
        return window, add(running, vector), watch, vector, terms.rows

    def _accumulate_from(
        self, batch: Any, window: list[Any], running: mx.array, watch: mx.array
    ) -> Any:
        """Add a batch's gradients, times their weight, to a window ``[gradients, weight, bad]``."""
        terms, gradients, is_good = self._gradients(batch)
        weight = mx.array(terms.weight, mx.float32)
        num_bad = mx.array(0.0)
        weighted = grad.weigh(gradients, weight)
        if is_good is not None:
            weighted = tree_map(lambda g: mx.where(is_good, g, 0.0), weighted)
            weight = mx.where(is_good, weight, 0.0)
            num_bad = mx.where(is_good, 0.0, 1.0)
        if window:
            weighted = tree_map(mx.add, window[0], weighted)
            weight, num_bad = window[1] + weight, window[2] + num_bad
        vector = self._pack(terms, is_good, self._no_update())
        watch = self._watch_loss(watch, terms.mean, ends_window=False)
        return [weighted, weight, num_bad], add(running, vector), watch, vector, terms.rows

    def _update_from_window(self, window: list[Any], running: mx.array, watch: mx.array) -> Any:
        """The update of an accumulated window: one division by its whole weight."""
        gradients, weight, num_bad = window
        conditions, overflowed = [], None
        if self._masks_weight or self.options.masks_bad_batches:
            conditions.append(weight > 0)
            weight = mx.where(weight > 0, weight, 1.0)
        if self._scaling:
            overflowed = num_bad > 0
            conditions.append(mx.logical_not(overflowed))
        gradients = tree_map(lambda g: g / weight, gradients)
        entries = self._update(gradients, conditions, overflowed)
        vector = self.sums.place(entries)
        watch = self._watch_loss(watch, mx.array(0.0), ends_window=True)
        return add(running, vector), watch

    def _gradients(self, batch: Any) -> tuple[Terms, Any, mx.array | None]:
        """Terms, gradients of the mean loss, and whether both are finite (None: not asked)."""
        model, precision = self.model, self.options.precision
        parameters = model.trainable_parameters()
        before = snapshot(model.state) if self.options.masks_bad_batches else None
        scale = self._scaling.get("scale")
        found: list[Terms] = []

        def scaled_loss(parameters: Any, batch: Any) -> mx.array:
            model.update(parameters)
            with precision.weights_cast(model):
                found.append(self.objective(model, precision.cast_inputs(batch)))
            return found[-1].mean if scale is None else found[-1].mean * scale

        gradients = mx.grad(scaled_loss)(parameters, batch)
        model.update(parameters)  # the transform leaves its own arrays in the model
        terms = found[-1]
        self._masks_weight = isinstance(terms.weight, mx.array) and not self._weight_on_host
        if self._host_batch is not None:
            self.objective.host_weight(self._host_batch)  # the number of classes is known now
        if scale is not None:
            gradients = tree_map(lambda g: g.astype(mx.float32) / scale, gradients)
        if before is None:
            return terms, gradients, None
        is_good = mx.logical_and(mx.isfinite(terms.mean), grad.all_finite(gradients))
        select(is_good, model.state, before)
        return terms, gradients, is_good

    def _update(
        self, gradients: Any, conditions: list[mx.array], overflowed: mx.array | None
    ) -> dict[str, dict[str, mx.array]]:
        """Clip and apply averaged gradients where all conditions hold; what to log about it."""
        options, model = self.options, self.model
        entries = self._no_update()
        norm = grad.global_norm(gradients) if self._logs_grad_norm else None
        if options.clip_norm is not None and norm is not None:
            gradients = grad.clip_by_norm(gradients, norm, options.clip_norm)
        if options.clip_value is not None:
            gradients = grad.clip_by_value(gradients, options.clip_value)
        parameters = model.trainable_parameters()
        gradients = tree_map(lambda g, p: g.astype(p.dtype), gradients, parameters)
        applies: mx.array | None = None
        if conditions:
            applies = mx.stack(conditions).all()
            before = snapshot(parameters), snapshot(self.optimizer.state)
        self.optimizer.update(model, gradients)
        if applies is not None:
            parameters = model.trainable_parameters()
            select(applies, parameters, before[0])
            model.update(parameters)
            select(applies, self.optimizer.state, before[1])
            entries["skipped_updates"] = {"sum": mx.where(applies, 0.0, 1.0)}
        if norm is not None:
            done = mx.array(1.0) if applies is None else applies.astype(mx.float32)
            entries["grad_norm"] = {"sum": mx.where(done > 0, norm, 0.0), "weight": done}
        if self._scaling and overflowed is not None:
            self._scaling.update(next_scale(self._scaling, overflowed))
        return entries

    def _no_update(self) -> dict[str, dict[str, mx.array]]:
        """Entries of the packed vector that only an update fills."""
        zero = mx.array(0.0)
        entries: dict[str, dict[str, mx.array]] = {}
        if self._logs_grad_norm:
            entries["grad_norm"] = {"sum": zero, "weight": zero}
        if self.options.masks_bad_batches or self._masks_weight:
            entries["skipped_updates"] = {"sum": zero}
        return entries

    def _pack(
        self, terms: Terms, is_good: mx.array | None, entries: dict[str, dict[str, mx.array]]
    ) -> mx.array:
        computes = dict(terms.computes)
        if "grad_norm" in entries:
            computes["grad_norm"] = divide
        if "skipped_updates" in entries:
            computes["skipped_updates"] = total if self.options.masks_bad_batches else nonzero_total
        states = terms.states
        if is_good is not None:
            # Gradients alone may overflow: then the loss still counts.
            is_finite = mx.isfinite(terms.mean)
            states = tree_map(lambda value: mx.where(is_finite, value, 0.0), states)
        return self.sums.pack(states | entries, computes)

    def _watch_loss(self, watch: mx.array, mean: mx.array, *, ends_window: bool) -> mx.array:
        windows, first, value = watch[0], watch[1], watch[2]
        if self.options.nonfinite != "raise":
            return mx.stack([windows + ends_window, first, value])
        if self._scaling:
            # With a loss scale an overflow is no error, until the scale has nowhere left to go.
            is_bad = self._scaling["scale"] < 1
        else:
            is_bad = mx.logical_not(mx.isfinite(mean))
        is_first = mx.logical_and(is_bad, first == 0)
        first = mx.where(is_first, windows + 1, first)
        value = mx.where(is_first, mean, value)
        return mx.stack([windows + ends_window, first, value])

    def _warn_of_promotion(self, batch: Any) -> None:
        precision = self.options.precision
        if not precision.name.startswith("mixed"):
            return
        saved, key = snapshot(self.model.state), RandomState()

        def run_forward() -> None:
            with precision.weights_cast(self.model):
                self.objective(self.model, precision.cast_inputs(batch))

        try:
            warn_of_promotion(self.model, run_forward)
        finally:
            restore(self.model.state, saved)
            key.restore()


# --- helpers -------------------------------------------------------------------------------------


def optimizers_of(optimizer: Any) -> list[Any]:
    """The optimizer itself, or the parts of a ``MultiOptimizer``."""
    return list(getattr(optimizer, "optimizers", [optimizer]))


def has_schedule(optimizer: Any) -> bool:
    """Whether the learning rate of an MLX optimizer follows a schedule."""
    return "learning_rate" in optimizer._schedulers


def warn_of_many_shapes(shapes: dict[Any, str], key: Any, batch: Any) -> None:
    """Note a new batch shape; each costs a compilation and memory that MLX never gives back."""
    shapes.setdefault(key, describe(batch))
    if len(shapes) == MAX_SHAPES + 1:
        newest = "; ".join(list(shapes.values())[-4:])
        warnings.warn(
            f"The step was compiled for {len(shapes)} different batch shapes, and each costs time "
            f"and memory that is not given back. The newest: {newest}. Pad batches to a few "
            "fixed lengths, or use drop_last for the last short one.",
            stacklevel=3,
        )


def _trainables(model: nn.Module) -> Any:
    """What a compiled step bakes in: the names of what is trained, and each module's mode."""
    names = [name for name, _ in named_arrays(model.trainable_parameters())]
    return names, [module.training for module in model.modules()]


def _check_trainables(model: nn.Module) -> None:
    named = named_arrays(model.trainable_parameters())
    if not named:
        raise ConfigurationError(
            "The model has no trainable parameters: everything is frozen. Call unfreeze() on the "
            "layers to train."
        )
    wrong = [name for name, value in named if not mx.issubdtype(value.dtype, mx.inexact)]
    if wrong:
        raise ConfigurationError(
            f"Trainable parameters that hold integers have no gradient: {', '.join(wrong)}. "
            "Freeze them, or start their names with an underscore to make them buffers."
        )
