"""The compiled functions of evaluation and prediction: nothing is updated.

May import: ``objective``, ``step``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.batch import describe, signature, to_mlx, unpack
from mlx_fit.logs import Sums, add
from mlx_fit.objective import Objective, float32, forward
from mlx_fit.step import StepOptions, Traced, warn_of_many_shapes


class EvaluationStep:
    """One batch of evaluation: nothing is updated, the sums are the only result."""

    def __init__(self, model: nn.Module, objective: Objective, options: StepOptions) -> None:
        self.sums = Sums()
        self._model = model
        self._objective = objective
        self._options = options
        self._host_batch: Any = None
        self._shapes: dict[Any, str] = {}
        state = [model.state, mx.random.state]
        self._batch = Traced(self._evaluate, state, [mx.random.state], options.compile)

    @property
    def num_traces(self) -> int:
        """How often the step was traced."""
        return self._batch.num_traces

    def __call__(self, batch: Any) -> None:
        """Add one batch to the sums."""
        host_batch = batch
        if self._objective.host_weight(host_batch) == 0.0:
            return
        batch = to_mlx(host_batch)
        key = signature(batch)
        if key in self._batch.seen:
            results = self._batch.function(batch, self.sums.running)
        else:
            results = self._first_call(key, host_batch, batch)
        self.sums.running, self.sums.batch, rows = results
        if rows:
            self.sums.rows.append(rows)

    def settle(self) -> None:
        """Evaluate the batch: waited for on the CPU, started elsewhere."""
        sums = self.sums
        if mx.default_device().type == mx.DeviceType.cpu:
            mx.eval(sums.running, sums.batch, sums.rows.newest)  # host synchronisation
        else:
            mx.async_eval(sums.running, sums.batch, sums.rows.newest)

    def _first_call(self, key: Any, host_batch: Any, batch: Any) -> Any:
        self._host_batch = host_batch
        warn_of_many_shapes(self._shapes, key, batch)
        try:
            return self.sums.growing(lambda: self._batch(key, batch, self.sums.running))
        except Exception as error:
            error.add_note(f"In the evaluation step, for the batch {describe(batch)}.")
            raise
        finally:
            self._host_batch = None

    def _evaluate(self, batch: Any, running: mx.array) -> Any:
        precision = self._options.precision
        with precision.weights_cast(self._model):
            terms = self._objective(self._model, precision.cast_inputs(batch))
        if self._host_batch is not None:
            self._objective.host_weight(self._host_batch)
        vector = self.sums.pack(terms.states, terms.computes)
        return add(running, vector), vector, terms.rows


class PredictionStep:
    """The model's outputs for one batch of inputs, floats as float32."""

    def __init__(self, model: nn.Module, options: StepOptions) -> None:
        self._model = model
        self._precision = options.precision
        state = [model.state, mx.random.state]
        self._batch = Traced(self._predict, state, [mx.random.state], options.compile)

    def __call__(self, host_batch: Any) -> Any:
        """Outputs, a tree of MLX arrays, not yet evaluated. Targets and weights are ignored."""
        x = to_mlx(unpack(host_batch).x)
        try:
            return self._batch(signature(x), x)
        except Exception as error:
            error.add_note(f"In the prediction step, for the batch {describe((x,))}.")
            raise

    def _predict(self, x: Any) -> Any:
        with self._precision.weights_cast(self._model):
            return float32(forward(self._model, self._precision.cast(x)))
