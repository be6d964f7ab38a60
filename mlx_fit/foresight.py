"""What a step will take of memory, compared with what there is, before it is computed.

On a CPU an allocation that fails ends the process without an exception, so it must not come to it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import leaves, named_arrays
from mlx_fit.batch import num_rows
from mlx_fit.errors import ConfigurationError, DataError, OutOfMemoryError, from_runtime_error
from mlx_fit.finetune.blocks import find_blocks
from mlx_fit.finetune.contexts import checkpoint_layers
from mlx_fit.objective import Objective
from mlx_fit.options import StepOptions
from mlx_fit.plan import (
    FAR_BELOW,
    Growth,
    MemoryPlan,
    Suggestion,
    make_plan,
    measure,
    smaller_batches,
)
from mlx_fit.precision import POLICIES, initial_scale
from mlx_fit.probing import Probe, untouched
from mlx_fit.runtime.memory import active_bytes, address_space_left, format_bytes, limits
from mlx_fit.step import TrainStep

MUCH_LARGER = 1.25  # times the largest batch that was found to fit
CAUTION = 16  # numbers that are kept for each output of each layer, at most, in a usual model
HEAD_SIZE = 64  # smallest usual size of an attention head: so many outputs for a row of scores


class Foresight:
    """Plans the memory of a trainer's steps, and refuses batches that will not fit.

    Args:
        model, optimizer, objective, options: the trainer's.
        has_limit: whether the user set a memory limit; then every first batch is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        has_limit: bool,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._objective = objective
        # Where batches are split, gradients and update come after each other: no more than fused.
        self._options = replace(options, on_oom="raise")
        self._has_limit = has_limit
        self._safe_size = 0  # numbers in the largest batch that was found to fit
        self._refused: tuple[Growth, float] | None = None  # and the numbers in one of its rows

    def plan(self, batch: Any) -> MemoryPlan:
        """Measure and predict everything; see :class:`~mlx_fit.plan.MemoryPlan`."""
        limit = min(limits().values())
        with untouched(self._model, self._optimizer, self._objective):
            probe = self._probe(self._options, limit)
            return make_plan(
                probe,
                batch,
                limit,
                accumulation=self._options.gradient_accumulation,
                alternatives=lambda growth: self._alternatives(growth, probe, batch, limit),
            )

    def __call__(self, batch: Any) -> None:
        """Raise if a batch that is larger than those before will not fit.

        Raises:
            OutOfMemoryError: nothing was computed, everything is as it was.
        """
        size, rows = _numbers(batch), _rows_of(batch)
        if rows == 0 or size <= MUCH_LARGER * self._safe_size:
            return
        if self._refused is not None:  # half of it, perhaps: what was measured tells
            refused, per_row = self._refused
            self._judge(refused, math.ceil(size / per_row), rows)
        elif rows > 1 and (growth := self._measured(batch, rows)) is not None:
            self._refused = growth, size / rows
            self._judge(growth, rows, rows)
            self._refused = None
        self._safe_size = size

    def _measured(self, batch: Any, rows: int) -> Growth | None:
        """How memory grows with the rows; None where that is not needed, or cannot be told."""
        limit = min(limits().values())
        has_limit = self._has_limit or address_space_left() is not None
        if not has_limit and self._rough_bound(batch, rows) < FAR_BELOW * limit:
            return None
        try:
            with untouched(self._model, self._optimizer, self._objective):
                return measure(self._probe(self._options, limit), batch, limit, FAR_BELOW)
        except Exception as error:
            typed = from_runtime_error(error, batch_size=rows)
            if isinstance(typed, OutOfMemoryError):
                raise typed from error
            return None  # the whole batch will show what is wrong, if anything is

    def _judge(self, growth: Growth, equal_rows: int, rows: int) -> None:
        """Raise if as many rows as were measured, ``equal_rows``, need more than there is."""
        found = limits()
        name = min(found, key=lambda name: found[name])
        needed, limit = growth.at(equal_rows), found[name]
        if needed <= limit:
            return
        raise OutOfMemoryError(
            f"A training step with batch_size={rows} is predicted to need {format_bytes(needed)}, "
            f"and the limit is {format_bytes(limit)} ({name}). Nothing was computed.",
            needed_bytes=needed,
            limit_bytes=limit,
            batch_size=rows,
            suggestion=_advice(growth, rows, limit, self._options),
            kind="foreseen",
        )

    def _probe(self, options: StepOptions, limit: int) -> Probe:
        def new_step(options: StepOptions) -> TrainStep:
            scaling = initial_scale() if options.precision.scales_loss else {}
            return TrainStep(self._model, self._optimizer, self._objective, options, scaling)

        return Probe(new_step, options, limit)

    def _rough_bound(self, batch: Any, rows: int) -> int:
        """More bytes than a usual model takes for the batch, from shapes alone."""
        outputs = sum(max(a.shape) for _, a in named_arrays(self._model.parameters()) if a.ndim > 1)
        positions = max([_positions(leaf) for _, leaf in leaves(batch)], default=rows)
        scores = 1 + positions / rows / HEAD_SIZE  # attention compares each position with each
        state = sum(a.nbytes for _, a in named_arrays(self._model.state) if isinstance(a, mx.array))
        activations = positions * outputs * CAUTION * 4 * scores
        return int(active_bytes() + 4 * state + activations)

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


def _advice(growth: Growth, rows: int, limit: int, options: StepOptions) -> str:
    from_the_plan = "trainer.plan(batch) shows what takes how much."
    smaller = smaller_batches(growth, rows, limit, options.gradient_accumulation)
    if not smaller or smaller[0].peak_bytes > limit:
        return (
            'Not even one row fits: use precision="mixed_bfloat16", finetune.checkpoint_layers, '
            f"or finetune.apply_lora to train fewer parameters. {from_the_plan}"
        )
    [(change, peak)] = smaller
    return f'Use {change} (predicted {format_bytes(peak)}), or on_oom="split". {from_the_plan}'


def _rows_of(batch: Any) -> int:
    """Rows of a batch; 0 where an objective has batches of another kind."""
    try:
        return num_rows(batch)
    except DataError:
        return 0


def _numbers(batch: Any) -> int:
    """How many numbers the arrays of a batch hold."""
    return sum(_size(leaf) for _, leaf in leaves(batch))


def _size(leaf: Any) -> int:
    return math.prod(getattr(leaf, "shape", ()))


def _positions(leaf: Any) -> int:
    """Places that a layer is applied to: tokens, pixels, rows."""
    shape = tuple(getattr(leaf, "shape", ()))
    is_float = "float" in str(getattr(leaf, "dtype", ""))
    return math.prod(shape[:-1]) if is_float and len(shape) > 1 else math.prod(shape)
