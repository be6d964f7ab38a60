"""What a batch of evaluation or prediction will take of memory, before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from mlx_fit.evaluation import EvaluationStep, PredictionStep
from mlx_fit.guard import Guard
from mlx_fit.objective import Objective
from mlx_fit.options import StepOptions
from mlx_fit.plan import FAR_BELOW, MARGIN, Growth, measure
from mlx_fit.probing import PassProbe, bytes_of, untouched
from mlx_fit.runtime.memory import format_bytes


class PassGuard(Guard):
    """Refuses batches of evaluation, or without an objective of prediction, that will not fit.

    Args:
        model, options: the trainer's.
        objective: the trainer's, or None.
        has_limit: whether the user set a memory limit; then every first batch is measured.
        num_ranks: that share each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None,
        options: StepOptions,
        has_limit: bool,
        num_ranks: int = 1,
    ) -> None:
        what = "An evaluation" if objective else "A prediction"
        super().__init__(model, what, has_limit, num_ranks)
        self._objective = objective
        self._options = options

    def growth(self, batch: Any, limit: int) -> Growth:
        """Of whole passes over some rows, as far as it is needed."""
        objective, state = self._objective, self._model.state
        with untouched([state], [] if objective is None else [objective]):
            probe = PassProbe(self._computing(), bytes_of(state))
            return measure(probe, batch, limit, FAR_BELOW)

    def _computing(self) -> Callable[[Any], object]:
        if self._objective is None:
            prediction = PredictionStep(self._model, self._options)
            prediction.start()
            return prediction
        step = EvaluationStep(self._model, self._objective, self._options)
        step.start()

        def compute(batch: Any) -> None:
            step(batch)
            step.settle()
            step.sums.restart()

        return compute

    def advice(self, growth: Growth, rows: int, limit: int) -> str:
        """A smaller batch."""
        largest = min(growth.largest(MARGIN * limit), rows // 2)
        if not largest:
            return 'Not even one row fits: use precision="mixed_bfloat16", or a smaller model.'
        peak = format_bytes(growth.at(largest))
        return f'Use batch_size={largest * self._num_ranks} (predicted {peak}), or on_oom="split".'
