"""Batches that do not fit, computed as smaller ones with the same result.

Imports layer 2: evaluation, step.
"""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx

from mlx_fit._tree import RandomState, set_leaf
from mlx_fit.batch import num_rows, rows_between
from mlx_fit.errors import OutOfMemoryError, from_runtime_error
from mlx_fit.evaluation import EvaluationStep
from mlx_fit.logs import FOLD, Sums
from mlx_fit.step import TrainStep

SPLIT_FOR = ("foreseen", "allocation", "execution")  # fewer rows do not make fewer buffers


class Splitter:
    """How many rows are computed at a time. The one place where that is decided.

    Ranks that train together must decide alike: whoever coordinates them replaces :meth:`agreed`.

    Attributes:
        rows: the most rows of a micro-batch; None while nothing was split.
    """

    def __init__(self) -> None:
        self.rows: int | None = None

    def parts(self, batch: Any) -> list[Any]:
        """The batch in micro-batches, in order: all of ``rows`` rows but the last."""
        size = self.rows
        if size is None or (total := num_rows(batch)) <= size:
            return [batch]
        return [rows_between(batch, start, start + size) for start in range(0, total, size)]

    def after(self, error: Exception, batch: Any) -> None:
        """Decide on half the rows that have just failed.

        Raises:
            OutOfMemoryError: one row did not fit, or fewer rows would not help.
            Exception: the error itself, if it was no lack of memory.
        """
        found = error if isinstance(error, OutOfMemoryError) else from_runtime_error(error)
        if not isinstance(found, OutOfMemoryError):
            raise error
        tried = min(self.rows or num_rows(batch), num_rows(batch))
        found.batch_size = tried
        if tried < 2 or found.kind not in SPLIT_FOR:
            raise found from (None if found is error else error)
        self.rows = self.agreed(-(-tried // 2))

    def report(self, batch: Any, what: str) -> None:
        """Say that batches are split from now on."""
        warnings.warn(
            f"Memory does not suffice for a batch of {num_rows(batch)} rows: {what} goes on with "
            f"micro-batches of {self.rows} rows.",
            stacklevel=4,
        )

    def agreed(self, rows: int) -> int:
        """The number of rows for all ranks, where there are others."""
        return rows


class SplittingStep:
    """A training step that redoes a batch in halves when memory runs out in its gradients.

    A failing batch leaves no trace: random key, buffers, weights, optimizer state and sums are put
    back, so the result is that of a run with micro-batches of this size from the start. Gradients
    are waited for before an update begins, which nothing can redo.

    Args:
        step: the training step, of a trainer with ``on_oom="split"``.
        splitter: decides on the size.
    """

    def __init__(self, step: TrainStep, splitter: Splitter) -> None:
        self._step = step
        self._splitter = splitter
        self._places: list[tuple[Any, Any]] = []
        self._places_of: list[Any] | None = None

    @property
    def sums(self) -> Sums:
        """What the epoch has added up so far."""
        return self._step.sums

    def __call__(self, batch: Any) -> None:
        """Take a batch: in one piece if that fits, in parts if not."""
        step, splitter, before = self._step, self._splitter, self._splitter.rows
        weight = step.objective.host_weight(batch)  # what is wrong with any row shows now
        while not self._is_computed(batch):
            mx.clear_cache()
        step.end_batch(weight)
        if splitter.rows != before:
            splitter.report(batch, "training")

    def settle(self) -> None:
        """Have the device compute the update, and wait: a failure must show at its own batch."""
        self._step.settle()
        if not self._step.waits_at_once:
            self._step.drain()

    def _is_computed(self, batch: Any) -> bool:
        """Whether the gradients could be computed; if not, the next try is with fewer rows."""
        step, sums = self._step, self._step.sums
        if self._splitter.rows is not None:
            step.use_windows()
        values, key, window = self._held(), RandomState(), step.window
        num_before, rows_before = sums.num_added, sums.rows.num_batches
        step.is_partial = True
        try:
            self._take_parts(batch)
        except Exception as error:
            for (container, name), value in zip(self._places, values, strict=True):
                set_leaf(container, name, value)
            key.restore()
            step.forget_parts(
                window, sums.num_added - num_before, sums.rows.num_batches - rows_before
            )
            self._splitter.after(error, batch)
            return False
        finally:
            step.is_partial = False
        return True

    def _take_parts(self, batch: Any) -> None:
        step, vectors = self._step, []
        for part in self._splitter.parts(batch):
            step(part)
            if step.sums.batch is not None:
                step.wait_for_gradients()  # before the next part, or both would be in memory
                vectors.append(step.sums.batch)
        if len(vectors) > 1:
            step.sums.batch = sum(vectors[1:], vectors[0])  # the whole batch's own values

    def _held(self) -> list[Any]:
        """The arrays of model, optimizer and loss scale as they are now."""
        parts = self._step.state_parts
        if parts is not self._places_of:
            self._places, self._places_of = _places(parts[:-1]), parts
        return [container[name] for container, name in self._places]


class SplittingEvaluation:
    """An evaluation step that redoes a batch in halves when memory runs out.

    Args:
        step: the evaluation step, which changes nothing but its sums.
        splitter: decides on the size; evaluation has its own.
    """

    def __init__(self, step: EvaluationStep, splitter: Splitter) -> None:
        self._step = step
        self._splitter = splitter

    @property
    def sums(self) -> Sums:
        """What the pass has added up so far."""
        return self._step.sums

    def __call__(self, batch: Any) -> None:
        """Take a batch: in one piece if that fits, in parts if not."""
        before = self._splitter.rows
        while not self._is_computed(batch):
            mx.clear_cache()
        if self._splitter.rows != before:
            self._splitter.report(batch, "evaluation")

    def settle(self) -> None:
        """Nothing is left to compute: the parts were waited for."""

    def _is_computed(self, batch: Any) -> bool:
        sums = self._step.sums
        num_before, rows_before = sums.num_added, sums.rows.num_batches
        vectors = []
        try:
            for part in self._splitter.parts(batch):
                self._step(part)
                if sums.batch is not None:
                    mx.eval(sums.batch, sums.rows.newest)  # host synchronisation
                    vectors.append(sums.batch)
        except Exception as error:
            sums.take_back(sums.num_added - num_before, sums.rows.num_batches - rows_before)
            self._splitter.after(error, batch)
            return False
        if len(vectors) > 1:
            sums.batch = sum(vectors[1:], vectors[0])
        if len(sums.pending) > FOLD:
            sums.fold()
        return True


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Container and key of every array of a tree."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return []
    found: list[tuple[Any, Any]] = []
    for key, value in items:
        found += [(tree, key)] if isinstance(value, mx.array) else _places(value)
    return found
