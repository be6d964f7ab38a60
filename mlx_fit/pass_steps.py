"""The steps of evaluation and prediction that a trainer keeps: each compiles its function once."""

from __future__ import annotations

import mlx.nn as nn

from mlx_fit.evaluation import EvaluationStep, PredictionStep
from mlx_fit.objective import Objective
from mlx_fit.options import StepOptions
from mlx_fit.pass_guard import PassGuard


class PassSteps:
    """Steps for a model, guarded; made anew for another model.

    Args:
        options: the trainer's.
        has_limit: whether the user set a memory limit.
        num_ranks: that share each batch.
    """

    def __init__(self, options: StepOptions, has_limit: bool, num_ranks: int = 1) -> None:
        self._options = options
        self._has_limit = has_limit
        self._num_ranks = num_ranks
        self._evaluation: EvaluationStep | None = None
        self._prediction: PredictionStep | None = None

    def new_evaluation(self, model: nn.Module, objective: Objective) -> EvaluationStep:
        """One that is kept from now on."""
        self._evaluation = self._guarded(model, objective)
        return self._evaluation

    def evaluation(self, model: nn.Module, objective: Objective) -> EvaluationStep:
        """The one that is kept; inside an evaluation one with sums of its own."""
        step = self._evaluation
        if step is None or step.model is not model:
            step = self.new_evaluation(model, objective)
        return self._guarded(model, objective) if step.is_running else step

    def prediction(self, model: nn.Module) -> PredictionStep:
        """The one that is kept."""
        step = self._prediction
        if step is None or step.model is not model:
            step = self._prediction = PredictionStep(model, self._options)
            step.guard = self._guard(model, None)
        return step

    def _guarded(self, model: nn.Module, objective: Objective) -> EvaluationStep:
        step = EvaluationStep(model, objective, self._options)
        step.guard = self._guard(model, objective)
        return step

    def _guard(self, model: nn.Module, objective: Objective | None) -> PassGuard:
        return PassGuard(model, objective, self._options, self._has_limit, self._num_ranks)
