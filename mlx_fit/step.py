"""The training step: one batch in, gradients, update and the sums that logs are made of.

It is compiled with model, optimizer and random state captured as inputs and outputs, the optimizer
initialised first, and built anew when what is trainable changes.

May import: ``compiled``, ``objective``, ``options``, ``step_state``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_fit import gradients as grad
from mlx_fit._tree import named_arrays, select, snapshot
from mlx_fit.batch import describe, is_empty, signature, to_mlx
from mlx_fit.compiled import Traced, evaluate_again, warn_of_many_shapes
from mlx_fit.errors import DataError, NonFiniteLossError, non_finite_loss
from mlx_fit.logs import FOLD, divide, nonzero_total, total, unlogged
from mlx_fit.modes import fingerprint
from mlx_fit.objective import Objective, Terms
from mlx_fit.options import StepOptions
from mlx_fit.precision import next_scale
from mlx_fit.rates import RateGuard, optimizers_of, settings
from mlx_fit.step_state import StepState
from mlx_fit.trainable import check_no_new, check_trained

MAX_IN_FLIGHT = 2  # steps that wait for the device, where it is not the CPU
SCALE_ENDED = "loss_scale_ended"  # not finite where the loss scale fell below 1


class TrainStep(StepState):
    """One batch of training: ``step(batch)``.

    Built for one fit, over the model and optimizer as they are then. A window is the
    ``gradient_accumulation`` batches that make one update.

    Attributes:
        logs_layer_norms: whether the norms of each layer's gradient are logged. Set it before the
            first batch.
        guard: called with each batch of a new shape before anything is computed; may raise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        scaling: dict[str, mx.array],
        checks_promotion: bool = False,
    ) -> None:
        super().__init__(model, options)
        self.optimizer = optimizer
        self.objective = objective
        if scaling:
            self.sums.watched = SCALE_ENDED
        elif options.nonfinite == "raise":
            self.sums.watched = "loss"
        self.logs_layer_norms = False
        self.guard: Callable[[Any], None] | None = None
        self._scaling = scaling
        self._checks_promotion = checks_promotion
        self._weight_on_host = True
        self._masks_weight = False  # set by a trace: whether a batch counts, the device must say
        self._host_batch: Any = None
        self._shapes: dict[Any, str] = {}
        self._old_traces = 0
        self._build()

    # --- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        check_trained(self.model)
        self.objective.start()
        # First, or the state's arrays appear during the first call and MLX traces twice.
        self.optimizer.init(self.model.trainable_parameters())
        self._built_for = self._fingerprint()
        self._state = [self.model.state, self.optimizer.state, self._scaling, mx.random.state]
        compiles = self.options.compile
        batch_function = self._update_from if self._is_fused else self._accumulate_from
        self._batch = Traced(batch_function, self._state, self._state, compiles)
        self._flush = Traced(self._update_from_window, self._state, self._state, compiles)
        self._rates = RateGuard(self.optimizer)
        self._rate_state = optimizers_of(self.optimizer)[0].state

    def _rebuild(self) -> None:
        self._rates.check()
        self._old_traces = self.num_traces
        self._build()

    def _fingerprint(self) -> list[Any]:
        # Shapes and dtypes too: a callback that changes them makes MLX trace again, unguarded.
        arrays = named_arrays([self.model.state, self.optimizer.state])
        shapes = [(n, a.shape, a.dtype) for n, a in arrays if isinstance(a, mx.array)]
        return [*fingerprint(self.model), settings(self.optimizer), shapes]

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
        self.num_batches = 0
        self._last_batch = num_batches
        self._first_window = self.num_windows
        self._settled = None
        self.num_skipped = 0
        if self._fingerprint() != self._built_for:
            self._rebuild()

    # --- a batch, on the host ---------------------------------------------------------------------

    def __call__(self, batch: Any) -> None:
        """Take one batch: its gradients and, if it is the last of its window, the update."""
        weight = self.objective.host_weight(batch)
        if weight is None and self._weight_on_host:
            self._weight_on_host = False
            self._rebuild()
        if weight != 0.0:
            if self._rates.is_needed:
                self._rates.check()
            arrays, sums = to_mlx(batch), self.sums
            key = (signature(arrays), len(self._window), self.objective.variant)
            self.is_whole = False
            if key in self._batch.seen:
                results = self._batch.function(key[2], arrays, self._window)
            else:
                results = self._first_call(key, batch, arrays)
            self._window, sums.batch, rows, *self._gradients_of_batch = results
            sums.pending.append(sums.batch)
            sums.tags.append(self.num_windows + 1)
            if rows:
                sums.rows.append(rows)
        else:
            self.sums.batch = None
        if self.is_partial:
            return
        if self._is_fused and weight != 0.0:
            self.num_batches += 1
            self.num_windows += 1  # in line: the usual case, and calls are counted
        else:
            self.end_batch(weight)

    def use_windows(self) -> None:
        """Compute gradients and update apart from now on, so that a batch can come in parts."""
        if self._is_fused:
            self._is_fused = False
            self._rebuild()

    def _first_call(self, key: Any, host_batch: Any, batch: Any) -> Any:
        """Meet a batch of a new shape: MLX traces, and bugs in user code show."""
        self._host_batch = host_batch
        warn_of_many_shapes(self._shapes, key[0], batch)
        try:
            if is_empty(batch):
                raise DataError("The batch has no rows. Leave empty batches out of the data.")
            if self.guard is not None:
                self.guard(host_batch)
            if self._checks_promotion:
                self._checks_promotion = False
                self.options.precision.look_for_promotion(
                    self.model, lambda: self.objective(self.model, batch)
                )
            return self.sums.growing(lambda: self._batch(key, key[2], batch, self._window))
        except Exception as error:
            error.add_note(f"In the training step, for the batch {describe(batch)}.")
            self.is_whole = True  # a trace that fails leaves everything as it was
            raise
        finally:
            self._host_batch = None

    def close_window(self) -> None:
        """Update the weights from the accumulated batches of the window, however many there are."""
        if self._window:
            self.sums.pending.append(self._flush(0, self._window))
            self.sums.tags.append(self.num_windows + 1)
            self._window = []
        else:
            self.num_skipped += 1  # the host knew its weight to be 0: nothing was dispatched
        self._num_in_window = 0
        self.num_windows += 1
        self.window_open = False

    def settle(self) -> None:
        """Evaluate what this step changed: at once on the CPU, two steps behind elsewhere."""
        sums = self.sums
        if self._rates.is_needed:
            self._rates.note()
        self.learning_rate = self._rate_state.get("learning_rate")
        live = self._state, self._window, sums.pending[-2:], sums.rows.newest
        if not self._is_async:
            try:
                mx.eval(*live)  # host synchronisation, the one of a step
            except RuntimeError as error:
                evaluate_again(error, *live)
            self._settled = sums.num_folded + len(sums.pending), self.num_windows
        else:
            mx.async_eval(*live)
            self._in_flight.append((sums.num_added, self.num_windows))
            if len(self._in_flight) > MAX_IN_FLIGHT:
                self._settled = self._in_flight.popleft()
                # Host synchronisation with the step before the last.
                mx.eval(sums.pending[: self._settled[0] - sums.num_folded])
        if len(sums.pending) > FOLD and self._settled is not None:
            sums.fold(self._settled[0])
        self.is_whole = True

    def note_replaced_state(self) -> None:
        """Weights and optimizer state were put in place on purpose, learning rates included."""
        self._rates.note()

    def only_gradients(self, arrays: Any) -> Any:
        """Gradients of a batch and its mean loss, lazily: for a plan of memory."""

        def compute(arrays: Any) -> Any:
            terms, gradients, _ = self._gradients(arrays)
            return gradients, terms.mean

        function = Traced(compute, self._state, self._state, self.options.compile)
        return function(signature(arrays), arrays)

    def bad_loss(self, number: int, epoch: int) -> NonFiniteLossError:
        """The error for a step with a non-finite loss, or with a loss scale that ran out."""
        loss = math.nan if self.settled is None else self.settled.bad_loss
        return non_finite_loss(number, epoch, loss, scales_loss=bool(self._scaling))

    # --- a batch, on the device: what is compiled -------------------------------------------------

    def _update_from(self, variant: bool, batch: Any, window: list[Any]) -> Any:
        """Gradients and update in one function: a window of one batch.

        ``variant`` is here for MLX, which compiles anew for each value of a Python argument.
        """
        terms, gradients, is_good = self._gradients(batch)
        conditions = [] if is_good is None else [is_good]
        if self._masks_weight:
            conditions.append(mx.array(terms.weight) > 0)
        overflowed = None if is_good is None else mx.logical_not(is_good)
        entries = self._update(gradients, conditions, overflowed)
        results = window, self._pack(terms, entries), terms.rows
        return (*results, gradients) if self.options.on_oom == "split" else results

    def _accumulate_from(self, variant: bool, batch: Any, window: list[Any]) -> Any:
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
        vector = self._pack(terms, self._no_update())
        return [weighted, weight, num_bad], vector, terms.rows

    def _update_from_window(self, window: list[Any]) -> mx.array:
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
        return self.sums.place(entries) if entries else mx.zeros_like(self.sums.lanes)

    def _gradients(self, batch: Any) -> tuple[Terms, Any, mx.array | None]:
        """Terms, gradients of the mean loss, and whether both are finite (None: not asked)."""
        model, precision = self.model, self.options.precision
        parameters = model.trainable_parameters()
        before = snapshot(model.state) if self.options.masks_bad_batches else None
        scale = self._scaling.get("scale")
        found: list[Terms] = []

        def scaled_loss(parameters: Any, batch: Any) -> mx.array:
            model.update(parameters)
            with precision.casting(model):
                found.append(self.objective(model, batch))
            return found[-1].mean if scale is None else found[-1].mean * scale

        gradients = mx.grad(scaled_loss)(parameters, batch)
        check_no_new(model, parameters)
        model.update(parameters)  # the transform leaves its own arrays in the model
        terms = found[-1]
        if isinstance(terms.weight, mx.array) and not self._weight_on_host:
            self._masks_weight = True
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
        norm: mx.array | None = None
        layer_norms = grad.layer_norms(model, gradients) if self.logs_layer_norms else None
        if layer_norms is not None:
            norm = mx.sqrt(layer_norms.square().sum())
        if options.clip_norm is not None:
            norm = grad.global_norm(gradients)
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
            if layer_norms is not None:
                sums = mx.where(done > 0, layer_norms, 0.0)
                entries["layer_grad_norms"] = {"sum": sums, "weight": done}
        if self._scaling and overflowed is not None:
            self._scaling.update(next_scale(self._scaling, overflowed))
            # An overflow is no error, until the scale has nowhere left to go.
            has_ended = overflowed & (self._scaling["scale"] < 1)
            entries[SCALE_ENDED] = {"sum": mx.where(has_ended, math.nan, 0.0)}
        return entries

    def _no_update(self) -> dict[str, dict[str, mx.array]]:
        """Entries of the packed vector that only an update fills."""
        zero = mx.array(0.0)
        entries: dict[str, dict[str, mx.array]] = {}
        if self.options.clip_norm is not None or self.logs_layer_norms:
            entries["grad_norm"] = {"sum": zero, "weight": zero}
        if self.logs_layer_norms:
            zeros = mx.zeros((len(grad.layer_names(self.model)),))
            entries["layer_grad_norms"] = {"sum": zeros, "weight": zero}
        if self.options.masks_bad_batches or self._masks_weight:
            entries["skipped_updates"] = {"sum": zero}
        if self._scaling:
            entries[SCALE_ENDED] = {"sum": zero}
        return entries

    def _pack(self, terms: Terms, entries: dict[str, dict[str, mx.array]]) -> mx.array:
        computes = dict(terms.computes)
        if "grad_norm" in entries:
            computes["grad_norm"] = divide
        if "layer_grad_norms" in entries:
            computes["layer_grad_norms"] = grad.named_norms(self.model)
        if "skipped_updates" in entries:
            computes["skipped_updates"] = total if self.options.masks_bad_batches else nonzero_total
        if SCALE_ENDED in entries:
            computes[SCALE_ENDED] = unlogged
        states = terms.states
        if self.options.masks_bad_batches:
            # Gradients alone may overflow: then the loss still counts.
            is_finite = mx.isfinite(terms.mean)
            keep = partial(tree_map, lambda value: mx.where(is_finite, value, 0))
            states, terms.rows = keep(states), keep(terms.rows)
        return self.sums.pack(states | entries, computes)
