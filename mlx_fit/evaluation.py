"""The compiled functions of evaluation and prediction: nothing is updated.

May import: ``compiled``, ``objective``, ``options``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_fit._tree import RandomState
from mlx_fit.batch import TextBatch, describe, signature, to_mlx, unpack
from mlx_fit.compiled import Traced, evaluate_again, warn_of_many_shapes
from mlx_fit.errors import DataError
from mlx_fit.logs import FOLD, Sums
from mlx_fit.modes import fingerprint
from mlx_fit.objective import Objective, float32, forward
from mlx_fit.options import StepOptions


def _inputs(batch: Any) -> Any:
    """What a model is called with: ``x``, or the tokens of a batch of text.

    Raises:
        DataError: rows of the batch hold several documents, which would see each other.
    """
    if not isinstance(batch, TextBatch):
        return unpack(batch).x
    if np.max(np.asarray(batch.segments), initial=0) > 1:
        raise DataError(
            "The batch has several documents in a row, which outputs cannot keep apart. For "
            "predictions use BucketBatches instead of PackedBatches."
        )
    return batch.tokens


class EvaluationStep:
    """One batch of evaluation: nothing is updated, the sums are the only result.

    Attributes:
        guard: called with each batch of a new shape before anything is computed; may raise.
    """

    def __init__(self, model: nn.Module, objective: Objective, options: StepOptions) -> None:
        self.sums = Sums()
        self.guard: Callable[[Any], None] | None = None
        self.is_running = False  # an evaluation inside an evaluation needs sums of its own
        self.model = model
        self._objective = objective
        self._options = options
        self._host_batch: Any = None
        self._shapes: dict[Any, str] = {}
        self._built_for: Any = None

    def start(self) -> None:
        """A new pass: forget the sums, and compile anew if the model's layers have changed."""
        self.sums.restart()
        if (now := fingerprint(self.model)) != self._built_for:
            self._built_for = now
            self._objective.start(self.model)
            state = [self.model.state, mx.random.state]
            self._batch = Traced(self._evaluate, state, state[1:], self._options.compile)

    @property
    def num_traces(self) -> int:
        """How often the step was traced since it was last built."""
        return self._batch.num_traces

    def __call__(self, batch: Any) -> None:
        """Add one batch to the sums. None is one of which this rank has no rows."""
        host_batch = batch
        if batch is None or self._objective.host_weight(host_batch) == 0.0:
            self.sums.batch = None
            return
        batch = to_mlx(host_batch)
        key = (signature(batch), self._objective.variant)
        if key in self._batch.seen:
            results = self._batch.function(key[1], batch)
        else:
            results = self._first_call(key, host_batch, batch)
        sums = self.sums
        sums.batch, rows = results
        sums.pending.append(results[0])
        sums.tags.append(0)
        if rows:
            sums.rows.append(rows)

    def settle(self) -> None:
        """Evaluate the batch: waited for on the CPU, started elsewhere."""
        sums = self.sums
        if mx.default_device().type == mx.DeviceType.cpu:
            try:
                mx.eval(sums.batch, sums.rows.newest)  # host synchronisation
            except RuntimeError as error:
                evaluate_again(error, sums.batch, sums.rows.newest)
        else:
            mx.async_eval(sums.batch, sums.rows.newest)
        if len(sums.pending) > FOLD:
            sums.fold(sums.num_added - 2)  # the last ones may be under way

    def _first_call(self, key: Any, host_batch: Any, batch: Any) -> Any:
        self._host_batch = host_batch
        warn_of_many_shapes(self._shapes, key[0], batch)
        try:
            if self.guard is not None:
                self.guard(host_batch)
            is_as_built = self._options.compile and fingerprint(self.model) == self._built_for
            results = self.sums.growing(lambda: self._batch(key, key[1], batch))
            if is_as_built:  # what a forward pass notes on the model, as a count, is no change
                self._built_for = fingerprint(self.model)
            return results
        except Exception as error:
            error.add_note(f"In the evaluation step, for the batch {describe(batch)}.")
            raise
        finally:
            self._host_batch = None

    def _evaluate(self, variant: Any, batch: Any) -> Any:
        precision = self._options.precision
        with precision.casting(self.model):
            terms = self._objective(self.model, batch)
        if self._host_batch is not None:
            self._objective.host_weight(self._host_batch)
        return self.sums.pack(terms.states, terms.computes), terms.rows


class PredictionStep:
    """The model's outputs for one batch of inputs, floats as float32.

    Attributes:
        guard: called with the inputs of each batch of a new shape before anything is computed.
    """

    def __init__(self, model: nn.Module, options: StepOptions) -> None:
        self.guard: Callable[[Any], None] | None = None
        self.model = model
        self._options = options
        self._built_for: Any = None

    def start(self) -> None:
        """A new pass: compile anew if the model's layers have changed."""
        if (now := fingerprint(self.model)) != self._built_for:
            self._built_for = now
            state = [self.model.state, mx.random.state]
            self._batch = Traced(self._predict, state, state[1:], self._options.compile)

    def __call__(self, host_batch: Any) -> Any:
        """Outputs, a tree of evaluated MLX arrays. Targets and weights are ignored."""
        x = to_mlx(_inputs(host_batch))
        key, random_state = signature(x), RandomState()
        try:
            if self.guard is not None and key not in self._batch.seen:
                self.guard((x,))
            outputs = self._outputs(key, x)
            try:
                mx.eval(outputs)  # host synchronisation
            except RuntimeError as error:
                evaluate_again(error, outputs)
        except Exception as error:
            error.add_note(f"In the prediction step, for the batch {describe((x,))}.")
            raise
        finally:
            random_state.restore()
        return outputs

    def on_host(self, host_batch: Any) -> Any:
        """The same as NumPy arrays."""
        return tree_map(_to_numpy, self(host_batch))

    def _outputs(self, key: Any, x: Any) -> Any:
        if key in self._batch.seen:
            return self._batch.function(x)
        is_as_built = self._options.compile and fingerprint(self.model) == self._built_for
        outputs = self._batch(key, x)
        if is_as_built:  # as in an evaluation
            self._built_for = fingerprint(self.model)
        return outputs

    def _predict(self, x: Any) -> Any:
        with self._options.precision.casting(self.model):
            return float32(forward(self.model, x))


def _to_numpy(leaf: Any) -> Any:
    """An output on the host; bfloat16, which NumPy does not have, as float32; None stays."""
    if not isinstance(leaf, mx.array):
        return leaf
    return np.array(leaf.astype(mx.float32) if leaf.dtype == mx.bfloat16 else leaf)
