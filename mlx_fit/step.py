"""The training step: one batch in, gradients, update and the sums that logs are made of.

It is compiled with model, optimizer and random state captured as inputs and outputs, the optimizer
initialised first, and built anew when what is trainable changes.

May import: ``baked``, ``communicator``, ``compiled``, ``objective``, ``options``, ``step_state``,
``updating``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_fit import gradients as grad
from mlx_fit._tree import select, snapshot
from mlx_fit.baked import BakedIn
from mlx_fit.batch import describe, is_empty, signature, to_mlx
from mlx_fit.communicator import Exchange
from mlx_fit.compiled import Traced, evaluate_again, warn_of_many_shapes
from mlx_fit.errors import DataError
from mlx_fit.habits import explain, no_variance
from mlx_fit.logs import FOLD
from mlx_fit.objective import Objective, Terms
from mlx_fit.options import StepOptions
from mlx_fit.rates import RateGuard, optimizers_of
from mlx_fit.step_state import StepState
from mlx_fit.trainable import check_no_new, check_trained, fitted, frozen_keys
from mlx_fit.updating import SCALE_ENDED, Update

MAX_IN_FLIGHT = 2  # steps that wait for the device, where it is not the CPU


class TrainStep(StepState):
    """One batch of training: ``step(batch)``.

    Built for one fit, over the model and optimizer as they are then. A window is the
    ``gradient_accumulation`` batches that make one update. With an ``exchange`` all ranks make the
    update together, and a batch of None is one of which this rank has no rows.

    Attributes:
        guard: called with each batch of a new shape before anything is computed; may raise.
        baked: what is compiled in; ``baked.look()`` where user code may have changed it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        scaling: dict[str, mx.array],
        checks_promotion: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(model, options, exchange)
        self.optimizer = optimizer
        self.objective = objective
        if scaling:
            self.sums.watched = SCALE_ENDED
        elif options.nonfinite == "raise":
            self.sums.watched = "loss"
        self.guard: Callable[[Any], None] | None = None
        self._scaling = scaling
        self._updates = Update(model, optimizer, options, scaling, self.sums, exchange is None)
        self._checks_promotion = checks_promotion
        self._weight_on_host = True
        self._host_batch: Any = None
        self._shapes: dict[Any, str] = {}
        self._frozen: list[set[str]] = []  # those of the layers themselves, which change in place
        self._frozen_then: list[set[str]] = []
        self._old_traces = 0
        self.baked = BakedIn(model, optimizer, self._follow_settings)
        self._build()

    # --- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        check_trained(self.model)
        self.objective.start(self.model)
        # First, or the state's arrays appear during the first call and MLX traces twice.
        self.optimizer.init(self.model.trainable_parameters())
        self._built_for = self.baked.everything()
        self._frozen = frozen_keys(self.model)
        self._frozen_then = [{*keys} for keys in self._frozen]
        self._state = [self.model.state, self.optimizer.state, self._scaling, mx.random.state]
        compiles = self.options.compile
        batch_function = self._update_from if self._is_fused else self._accumulate_from
        self._batch = Traced(batch_function, self._state, self._state, compiles)
        self._flush = Traced(self._updates.from_window, self._state, self._state, compiles)
        self._rates = RateGuard(self.optimizer)
        self._rate_state = optimizers_of(self.optimizer)[0].state
        self.baked.note()

    def _rebuild(self) -> None:
        self._rates.check()
        self._old_traces = self.num_traces
        self._build()

    def follow_freezes(self) -> None:
        """Build anew if something was frozen or thawed since, by a callback for instance."""
        if self._frozen == self._frozen_then or (self._window and self.exchange is not None):
            return
        self._rebuild()
        if self._window:  # what was frozen keeps its value, what was thawed had no gradient yet
            gradients, *rest = self._window
            self._window = [fitted(gradients, self.model.trainable_parameters()), *rest]

    def _follow_settings(self) -> None:
        """The same for the layers, their settings and the optimizer's."""
        if self._window and self.exchange is not None:
            return  # it looks changed still when the window is closed
        if self.baked.has_changed():
            self.wait()
            self.follow_freezes()  # it may be these, which an open window must follow
            if self.baked.everything() != self._built_for:
                self._rebuild()

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
        self._count_anew(num_batches)
        if self.baked.everything() != self._built_for:
            self._rebuild()

    # --- a batch, on the host ---------------------------------------------------------------------

    def __call__(self, batch: Any) -> None:
        """Take one batch: its gradients and, if it is the last of its window, the update."""
        if self.exchange is not None:
            self.wait()  # before anything is told to the others
        if self._frozen != self._frozen_then:
            self.follow_freezes()
        weight = 0.0 if batch is None else self.objective.host_weight(batch)
        if not self._has_begun:
            self.begin_window()
        if weight is None and self._weight_on_host:
            self._weight_on_host = False
            self._rebuild()
        if weight != 0.0:
            if self._rates.is_needed:
                self._rates.check()
            arrays, sums = to_mlx(batch), self.sums
            every = self.norms_every  # norms_now in line: calls are counted
            norms = self._is_fused and (self.num_windows + 1) % every == 0 if every else None
            variant = self.objective.variant, norms
            key = (signature(arrays), len(self._window), variant)
            self.is_whole = False
            if key in self._batch.seen:
                results = self._batch.function(variant, arrays, self._window)
            else:
                results = self._first_call(key, batch, arrays)
            self._window, sums.batch, rows, *self._gradients_of_batch = results
            if self.exchange is None:
                sums.pending.append(sums.batch)
                sums.tags.append(self.num_windows + 1)
            else:
                sums.open.append(sums.batch)
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
        self.wait()
        self._host_batch = host_batch
        self.objective.prepare(self.model, host_batch)
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
            return self.sums.growing(lambda: self._trace(key, batch))
        except Exception as error:
            explain(error)
            rank = None if self.exchange is None else self.exchange.rank
            found = no_variance(error, rank, self.options.on_oom == "split") or error
            found.add_note(f"In the training step, for the batch {describe(batch)}.")
            self.is_whole = True  # a trace that fails leaves everything as it was
            if found is error:
                raise
            raise found from error
        finally:
            self._host_batch = None

    def _trace(self, key: Any, batch: Any) -> Any:
        """A call that MLX traces. What a forward pass sets is no change."""
        if not self.options.compile:
            return self._batch(key, key[2], batch, self._window)
        is_as_built = self.baked.everything() == self._built_for
        results = self.baked.tracing(lambda: self._batch(key, key[2], batch, self._window))
        if is_as_built:
            self._built_for = self.baked.everything()
        return results

    def close_window(self) -> None:
        """Update the weights from the accumulated batches of the window, however many there are."""
        if self.exchange is not None:
            self._close_together(self.exchange)
        elif self._window:
            self.follow_freezes()
            norms = self.norms_now
            self.sums.pending.append(self._flush(norms, norms, self._window))
            self.sums.tags.append(self.num_windows + 1)
            self._window = []
        else:
            self.num_skipped += 1  # the host knew its weight to be 0: nothing was dispatched
        self._num_in_window = 0
        self.num_windows += 1
        self.window_open = False

    def _close_together(self, exchange: Exchange) -> None:
        """Close the window of all ranks; their sums take the place of this rank's."""
        self.wait()  # nothing else may hold what the update reuses
        self.begin_window()  # of one that was loaded full, there was no batch
        if self.before_closing is not None:
            self.before_closing()
        self.is_whole = self._has_begun = False
        sums = self.sums
        shared = exchange.close(self.model, self._window, sums, self.num_windows)
        self._window, sums.open, sums.batch = [], [], shared.vector
        sums.pending.append(shared.vector)
        sums.tags.append(self.num_windows + 1)
        if shared.is_update:
            norms = self.norms_now
            flush = partial(self._flush, norms, norms, shared.window)
            vector = exchange.update(self.model, flush if shared.window else None)
            if vector is not None:
                sums.extend_batch(vector)
        elif not shared.logs_skip:
            self.num_skipped += 1

    def settle(self) -> None:
        """Start to evaluate what this step changed.

        On the CPU once the step before is finished: while that is computed the next batch is
        fetched and made a graph. Elsewhere once the step before that one is.
        """
        sums = self.sums
        if self._rates.is_needed:
            self._rates.note()
        self.learning_rate = self._rate_state.get("learning_rate")
        live = self._state, self._window, sums.pending[-2:], sums.open, sums.rows.newest
        num_added = sums.num_folded + len(sums.pending)
        if self._overlaps:
            self.wait()
            self.is_whole = False
        evaluate = mx.async_eval if self._overlaps or self._is_async else mx.eval
        try:
            evaluate(*live)
        except RuntimeError as error:
            evaluate_again(error, *live)
        if self._overlaps:
            self._awaited = num_added
        elif not self._is_async:
            self._settled = num_added
        else:
            self._in_flight.append(num_added)
            if len(self._in_flight) > MAX_IN_FLIGHT:
                self._settled = self._in_flight.popleft()
                # Host synchronisation with the step before the last.
                mx.eval(sums.pending[: self._settled - sums.num_folded])
        if len(sums.pending) > FOLD and self._settled is not None:
            sums.fold(self._settled)
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

    # --- a batch, on the device: what is compiled -------------------------------------------------

    def _update_from(self, variant: Any, batch: Any, window: list[Any]) -> Any:
        """Gradients and update in one function: a window of one batch.

        ``variant`` is the objective's, and :attr:`norms_now`. MLX compiles anew for each value of a
        Python argument.
        """
        terms, gradients, is_good = self._gradients(batch)
        conditions = [] if is_good is None else [is_good]
        if self._updates.masks_weight:
            conditions.append(mx.array(terms.weight) > 0)
        overflowed = None if is_good is None else mx.logical_not(is_good)
        entries = self._updates.apply(gradients, conditions, overflowed, variant[1])
        results = window, self._updates.pack(terms, entries), terms.rows
        return (*results, gradients) if self.options.on_oom == "split" else results

    def _accumulate_from(self, variant: Any, batch: Any, window: list[Any]) -> Any:
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
        vector = self._updates.pack(terms, self._updates.nothing(variant[1]))
        return [weighted, weight, num_bad], vector, terms.rows

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
            self._updates.masks_weight = self.exchange is None  # else the host sees it
        if self._host_batch is not None:
            self.objective.host_weight(self._host_batch)  # the number of classes is known now
        if scale is not None:
            gradients = tree_map(lambda g: g.astype(mx.float32) / scale, gradients)
        if before is None:
            return terms, gradients, None
        is_good = mx.logical_and(mx.isfinite(terms.mean), grad.all_finite(gradients))
        select(is_good, model.state, before)
        return terms, gradients, is_good
