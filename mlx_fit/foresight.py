"""What a training step will take of memory, and what would make it less."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from mlx_fit.batch import num_rows
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.blocks import find_blocks
from mlx_fit.finetune.contexts import checkpoint_layers
from mlx_fit.guard import Guard
from mlx_fit.objective import FunctionObjective, Objective
from mlx_fit.options import StepOptions
from mlx_fit.plan import (
    FAR_BELOW,
    Growth,
    MemoryPlan,
    Suggestion,
    check_batch,
    make_plan,
    measure,
    smaller_batches,
)
from mlx_fit.precision import POLICIES, initial_scale
from mlx_fit.probing import Probe, untouched
from mlx_fit.rates import optimizers_of
from mlx_fit.runtime.memory import format_bytes, limits
from mlx_fit.step import TrainStep


class Foresight(Guard):
    """Plans the memory of a trainer's steps, and refuses batches that will not fit.

    Args:
        model, optimizer, objective, options: the trainer's.
        has_limit: whether the user set a memory limit; then every first batch is measured.
        num_ranks: that share each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        has_limit: bool,
        num_ranks: int = 1,
    ) -> None:
        super().__init__(model, "A training step", has_limit, num_ranks)
        self._optimizer = optimizer
        self._objective = objective
        # Where batches are split, gradients and update come after each other: no more than fused.
        self._options = replace(options, on_oom="raise")

    def plan(self, batch: Any) -> MemoryPlan:
        """Measure and predict everything; see :class:`~mlx_fit.plan.MemoryPlan`."""
        check_batch(batch, is_cut=not isinstance(self._objective, FunctionObjective))
        limit = min(limits().values())
        with self._untouched():
            probe = self._probe(self._options, limit)
            return make_plan(
                probe,
                batch,
                limit,
                accumulation=self._options.gradient_accumulation,
                alternatives=lambda growth: self._alternatives(growth, probe, batch, limit),
            )

    def growth(self, batch: Any, limit: int) -> Growth:
        """Of whole steps, as far as it is needed."""
        with self._untouched():
            return measure(self._probe(self._options, limit), batch, limit, FAR_BELOW)

    def advice(self, growth: Growth, rows: int, limit: int) -> str:
        """A smaller batch, or a smaller model."""
        from_the_plan = "trainer.plan(batch) shows what takes how much."
        accumulation = self._options.gradient_accumulation
        smaller = smaller_batches(growth, rows, limit, accumulation, self._num_ranks)
        if not smaller or smaller[0].peak_bytes > limit:
            few = "one row fits" if growth.fewest == 1 else f"{growth.fewest} rows fit"
            return (
                f'Not even {few}: use precision="mixed_bfloat16", finetune.checkpoint_layers, or '
                f"finetune.apply_lora to train fewer parameters. {from_the_plan}"
            )
        [(change, peak)] = smaller
        return f'Use {change} (predicted {format_bytes(peak)}), or on_oom="split". {from_the_plan}'

    def _untouched(self) -> AbstractContextManager[None]:
        optimizer = self._optimizer
        owners = [*optimizers_of(optimizer), optimizer, self._objective]
        return untouched([self._model.state, optimizer.state], owners)

    def _probe(self, options: StepOptions, limit: int) -> Probe:
        def new_step(options: StepOptions) -> TrainStep:
            scaling = initial_scale() if options.precision.scales_loss else {}
            return TrainStep(self._model, self._optimizer, self._objective, options, scaling)

        return Probe(new_step, options, limit)

    def _alternatives(
        self, growth: Growth, probe: Probe, batch: Any, limit: int
    ) -> list[Suggestion]:
        """Half precision, recomputed blocks and adapters, each with its predicted peak."""
        found, rows, options = [], num_rows(batch), self._options
        if options.precision.compute_dtype is None:
            half = replace(options, precision=POLICIES["mixed_bfloat16"])
            change = 'precision="mixed_bfloat16"'
            found.append(Suggestion(change, self._peak(half, batch, rows, limit)))
        if find_blocks(self._model) is None:
            return found
        change = "with finetune.checkpoint_layers(model): around fit"
        peak = self._peak_recomputed(batch, rows, limit)
        if peak is not None:
            found.append(Suggestion(change, peak))
        if probe.frozen_bytes < probe.weight_bytes / 2:
            # Adapters have gradients and optimizer state of their own, which are small.
            alone = growth.alone + growth.slope * (rows - growth.points[-1][0])
            peak = int(alone) - probe.gradient_bytes - probe.optimizer_bytes
            found.append(Suggestion("finetune.apply_lora(model)", peak))
        return found

    def _peak(self, options: StepOptions, batch: Any, rows: int, limit: int) -> int:
        return measure(self._probe(options, limit), batch, limit).at(rows)

    def _peak_recomputed(self, batch: Any, rows: int, limit: int) -> int | None:
        try:
            with checkpoint_layers(self._model):
                return self._peak(self._options, batch, rows, limit)
        except ConfigurationError:
            return None
