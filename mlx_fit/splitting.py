"""Batches that do not fit, computed as smaller ones with the same result.

Imports layer 2: evaluation, step.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_fit._tree import RandomState, set_leaf
from mlx_fit.batch import join_outputs, num_rows, rows_between
from mlx_fit.errors import OutOfMemoryError, from_runtime_error
from mlx_fit.evaluation import EvaluationStep, PredictionStep
from mlx_fit.logs import FOLD, Sums
from mlx_fit.step import TrainStep

SPLIT_FOR = ("foreseen", "allocation", "execution")  # fewer rows do not make fewer buffers


class Splitter:
    """How many rows are computed at a time. The one place where that is decided.

    Attributes:
        rows: the most rows of a micro-batch; None while nothing was split.
    """

    def __init__(self) -> None:
        self.rows: int | None = None

    def parts(self, batch: Any) -> list[Any]:
        """The batch in micro-batches, in order: all of ``rows`` rows but the last.

        A last one of a single row, which BatchNorm refuses, gets one more of the part before it.
        """
        size = self.rows
        if size is None or batch is None or (total := num_rows(batch)) <= size:
            return [batch]
        ends = [*range(size, total, size), total]
        if total - ends[-2] == 1 and size > 2:
            ends[-2] -= 1
        return [rows_between(batch, start, end) for start, end in pairwise([0, *ends])]

    def after(self, error: Exception, batch: Any) -> None:
        """Decide on half the rows that have just failed.

        Raises:
            OutOfMemoryError: one row did not fit, or fewer rows would not help.
            Exception: the error itself, if it was no lack of memory.
        """
        is_found = isinstance(error, OutOfMemoryError)
        if not is_found and from_runtime_error(error) is None:
            raise error
        tried = min(self.rows or num_rows(batch), num_rows(batch))
        found = error if is_found else from_runtime_error(error, batch_size=tried)
        if not isinstance(found, OutOfMemoryError):
            raise error
        found.batch_size = tried
        if tried < 2 or found.kind not in SPLIT_FOR:
            raise found from (None if found is error else error)
        self.rows = -(-tried // 2)

    def report(self, batch: Any, what: str) -> None:
        """Say that batches are split from now on."""
        warnings.warn(
            f"Memory does not suffice for a batch of {num_rows(batch)} rows: {what} goes on with "
            f"micro-batches of {self.rows} rows.",
            stacklevel=4,
        )

    def report_of(self, ranks: list[int]) -> None:
        """The same where others train along, and these ranks have not memory enough."""
        warnings.warn(
            f"Memory of rank {', '.join(map(str, ranks))} does not suffice for its part of a "
            f"batch: all ranks go on with micro-batches of at most {self.rows} rows.",
            stacklevel=5,
        )


class Splitters:
    """Those of a trainer, None where batches are not split.

    Training's size is the run's; the others change no result.

    Args:
        splits: whether there are any.
    """

    def __init__(self, splits: bool) -> None:
        self.training = Splitter() if splits else None
        self.evaluation = Splitter() if splits else None
        self.prediction = Splitter() if splits else None

    @property
    def rows(self) -> int | None:
        """The most rows of a micro-batch of training; None while nothing was split."""
        return None if self.training is None else self.training.rows


class _Start:
    """What there is before batches that may have to be redone.

    To be let go of before the update, which reuses the arrays that nobody else holds.

    Args:
        step: the training step.
        places: container and key of each array of model, optimizer and loss scale.
    """

    def __init__(self, step: TrainStep, places: list[tuple[Any, Any]]) -> None:
        self._step = step
        self._held = [(container, name, container[name]) for container, name in places]
        self._key = RandomState()
        self._window, self._mark = step.window, step.sums.mark()

    def go_back(self) -> None:
        """Put everything back."""
        for container, name, value in self._held:
            set_leaf(container, name, value)
        self._key.restore()
        self._step.forget_parts(self._window, self._mark)


class SplittingStep:
    """A training step that redoes a batch in halves when memory runs out in its gradients.

    A failing batch leaves no trace: random key, buffers, weights, optimizer state and sums are put
    back, so the result is that of a run with micro-batches of this size from the start. Gradients
    are waited for before an update begins, which nothing can redo.

    With other ranks a whole window is redone, before anything of it is sent: all of them compute it
    with the fewest rows that one of them needs. They agree with one number for each window.

    Args:
        step: the training step, of a trainer with ``on_oom="split"``.
        splitter: decides on the size.
    """

    def __init__(self, step: TrainStep, splitter: Splitter) -> None:
        self._step = step
        self._splitter = splitter
        self._places: list[tuple[Any, Any]] = []
        self._places_of: list[Any] | None = None
        self._start: _Start | None = None
        self._batches: list[Any] = []  # since then
        self._said = splitter.rows
        if step.exchange is not None:
            step.before_closing = self._agree

    @property
    def sums(self) -> Sums:
        """What the epoch has added up so far."""
        return self._step.sums

    def __call__(self, batch: Any) -> None:
        """Take a batch: in one piece if that fits, in parts if not."""
        step, splitter, before = self._step, self._splitter, self._splitter.rows
        # What is wrong with any row shows now.
        weight = 0.0 if batch is None else step.objective.host_weight(batch)
        if self._start is None:
            step.follow_freezes()
            step.begin_window()
            self._start = self._new_start()
        self._batches.append(batch)
        self._compute([batch])
        if step.exchange is None:
            self._let_go()
        step.end_batch(weight)
        if step.exchange is None and splitter.rows != before:
            splitter.report(batch, "training")

    def settle(self) -> None:
        """Have the device compute the update, and wait: a failure must show at its own batch."""
        self._step.settle()
        if not self._step.waits_at_once:
            self._step.drain()

    def _compute(self, batches: list[Any]) -> None:
        """Compute the gradients of these, and all since the start again when that fails.

        Raises:
            OutOfMemoryError: no smaller parts can be had, or would help.
            Exception: whatever else went wrong; all is as it was at the start.
        """
        step, splitter = self._step, self._splitter
        while True:
            newest = batches[0]
            step.is_partial = True
            try:
                for newest in batches:
                    self._take_parts(newest)
                return
            except Exception as error:
                self._go_back()
                splitter.after(error, newest)
            finally:
                step.is_partial = False
            self._start, batches = self._new_start(), self._batches
            mx.clear_cache()

    def _take_parts(self, batch: Any) -> None:
        step, vectors = self._step, []
        for part in self._splitter.parts(batch):
            step(part)
            if step.sums.batch is not None:
                step.wait_for_gradients()  # before the next part, or both would be in memory
                vectors.append(step.sums.batch)
        if len(vectors) > 1:
            step.sums.batch = sum(vectors[1:], vectors[0])  # the whole batch's own values

    # --- and again --------------------------------------------------------------------------------

    def _new_start(self) -> _Start:
        step = self._step
        if self._splitter.rows is not None:
            step.use_windows()
        if step.state_parts is not self._places_of:
            self._places, self._places_of = _places(step.state_parts[:-1]), step.state_parts
        return _Start(step, self._places)

    def _go_back(self) -> None:
        assert self._start is not None
        self._start.go_back()

    def _let_go(self) -> None:
        self._start, self._batches = None, []

    # --- with other ranks -------------------------------------------------------------------------

    def _agree(self) -> None:
        """Before a window is closed: all ranks compute it with the fewest rows that one needs."""
        splitter, exchange = self._splitter, self._step.exchange
        assert exchange is not None
        wishes = exchange.gather_number(splitter.rows or 0)
        short = [rank for rank, rows in enumerate(wishes) if rows]
        while len({*wishes}) > 1:
            least = min(rows for rows in wishes if rows)
            short = [rank for rank, rows in enumerate(wishes) if rows == least]
            if splitter.rows != least:
                splitter.rows = least
                self._go_back()
                self._compute(self._batches)
            wishes = exchange.gather_number(splitter.rows or 0)
        self._let_go()
        if splitter.rows != self._said:
            self._said = splitter.rows
            if exchange.rank == 0:
                splitter.report_of(short)


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
        mark, vectors = sums.mark(), []
        try:
            for part in self._splitter.parts(batch):
                self._step(part)
                if sums.batch is not None:
                    mx.eval(sums.batch, sums.rows.newest)  # host synchronisation
                    vectors.append(sums.batch)
        except Exception as error:
            sums.back_to(mark)
            self._splitter.after(error, batch)
            return False
        if len(vectors) > 1:
            sums.batch = sum(vectors[1:], vectors[0])
        if len(sums.pending) > FOLD:
            sums.fold()
        return True


class SplittingPrediction:
    """A prediction step that computes a batch in halves when memory runs out.

    Args:
        step: the prediction step.
        splitter: decides on the size; prediction has its own.
    """

    def __init__(self, step: PredictionStep, splitter: Splitter) -> None:
        self._step = step
        self._splitter = splitter

    def __call__(self, batch: Any) -> Any:
        """Outputs, a tree of NumPy arrays."""
        before = self._splitter.rows
        while True:
            try:
                found = [self._step.on_host(p) for p in self._splitter.parts(batch)]
                break
            except Exception as error:
                self._splitter.after(error, batch)
            mx.clear_cache()
        if self._splitter.rows != before:
            self._splitter.report(batch, "prediction")
        if len(found) == 1:
            return found[0]
        return join_outputs(found, "It cannot be computed in parts: use a smaller batch_size.")


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
