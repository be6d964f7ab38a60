"""What a training step takes of memory, measured on a few rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_fit._tree import RandomState, named_arrays, restore, snapshot
from mlx_fit.batch import rows_between, to_mlx
from mlx_fit.errors import DataError
from mlx_fit.precision import weights_of
from mlx_fit.runtime.memory import active_bytes, measured_peak
from mlx_fit.step import MAX_IN_FLIGHT, TrainStep

NewStep = Callable[[Any], TrainStep]
# MLX allocates on one thread and frees on another, so that equal steps have other peaks: as many
# are measured. Elsewhere than on a CPU they are also what is in flight at a time.
STEADY = MAX_IN_FLIGHT + 1


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays; one that is there twice counts once."""
    found = {id(a): a.nbytes for _, a in named_arrays(tree) if isinstance(a, mx.array)}
    return sum(found.values())


class Probe:
    """Runs a training step of its own on the live model, and puts everything back.

    Args:
        new_step: makes a step for given options.
        options: those of the run.
        limit_bytes: the state is copied only while that fits.

    Attributes:
        weight_bytes, optimizer_bytes, gradient_bytes, frozen_bytes: of what a step reads and
            writes; ``frozen_bytes`` is part of ``weight_bytes``.
        cast_bytes: of the weights in the dtype of the forward pass, where that is another.
        window_bytes: what gradient accumulation would add; 0 where there is some already.
        largest_bytes: of the largest array that is trained.
        other_bytes: what was there besides.
    """

    def __init__(self, new_step: NewStep, options: Any, limit_bytes: int) -> None:
        # Two batches show a window that is open and its update; more of them are like the second.
        self._num_batches = min(options.gradient_accumulation, 2)
        self._step = new_step(replace(options, gradient_accumulation=self._num_batches))
        self._limit_bytes = limit_bytes
        model, optimizer = self._step.model, self._step.optimizer
        mx.eval(model.state, optimizer.state)
        self._parts = [model.state, optimizer.state]
        trained = model.trainable_parameters()
        self.weight_bytes = bytes_of(model.state)
        self.optimizer_bytes = bytes_of(optimizer.state)
        self.gradient_bytes = bytes_of(trained)
        numbers = sum(array.size for _, array in named_arrays(trained))
        self.window_bytes = 4 * numbers if self._num_batches == 1 else 0
        self.largest_bytes = max([array.nbytes for _, array in named_arrays(trained)], default=0)
        self.frozen_bytes = self.weight_bytes - self.gradient_bytes
        dtype = options.precision.compute_dtype
        wide = [a for _, a in weights_of(model) if dtype is not None and a.dtype != dtype]
        self.cast_bytes = sum(array.size * 2 for array in wide)
        self.other_bytes = active_bytes() - self.weight_bytes - self.optimizer_bytes

    @property
    def state_bytes(self) -> int:
        """Weights and optimizer state."""
        return self.weight_bytes + self.optimizer_bytes

    def peak(self, batch: Any, num_rows: int) -> int:
        """The most bytes that are live in a step of the first rows, all else of now included.

        Raises:
            DataError: these rows weigh nothing, so nothing is computed.
        """
        rows, step = rows_between(batch, 0, num_rows), self._step
        with _put_back(self._parts):
            copied = self._copy_state()
            step.note_replaced_state()
            step.start_epoch()
            # While MLX traces the first, its work is done and freed in between: others tell.
            with measured_peak() as peak:
                for _ in range(self._num_batches * (1 + STEADY)):
                    step(rows)
                    step.settle()
                step.drain()
            if step.sums.batch is None:
                raise DataError("The first rows of the batch weigh nothing, so nothing is known.")
            return peak.num_bytes - copied

    def gradient_peak(self, batch: Any, num_rows: int) -> int:
        """The same for the gradients alone: what grows with the rows, without the update."""
        rows, step = rows_between(batch, 0, num_rows), self._step
        step.objective.host_weight(rows)
        with _put_back(self._parts), measured_peak() as peak:
            for _ in range(STEADY):
                results = step.only_gradients(to_mlx(rows))
                mx.eval(results, self._parts)  # host synchronisation: it is measured
                del results
        return peak.num_bytes

    def _copy_state(self) -> int:
        """Put copies into the model, so that a step may reuse them; their bytes, 0 without room.

        Arrays that somebody holds, as this probe holds the originals, are not reused.
        """
        if active_bytes() + 3 * self.state_bytes > self._limit_bytes:
            return 0
        before = active_bytes()
        for part in self._parts:
            restore(part, tree_map(_copied, snapshot(part)))
        mx.eval(self._parts)
        return active_bytes() - before


def _copied(leaf: Any) -> Any:
    return leaf * 1 if isinstance(leaf, mx.array) and leaf.dtype != mx.bool_ else leaf


@contextmanager
def _put_back(parts: list[Any]) -> Iterator[None]:
    """Everything as it was outside: the arrays of ``parts``, and the random key."""
    saved, key = [snapshot(part) for part in parts], RandomState()
    try:
        yield
    finally:
        for part, kept in zip(parts, saved, strict=True):
            restore(part, kept)
        key.restore()


@contextmanager
def untouched(parts: list[Any], owners: list[Any]) -> Iterator[None]:
    """Arrays of trees, fields of objects and the random key after it as before, whatever is probed.

    An optimizer that has no state yet has none afterwards.
    """
    fields = [(owner, {**vars(owner)}) for owner in owners]
    with _put_back(parts):
        try:
            yield
        finally:
            for owner, kept in fields:
                vars(owner).clear()
                vars(owner).update(kept)


class PassProbe:
    """The same for a pass that updates nothing: evaluation or prediction.

    Its attributes are those of :class:`Probe`, as far as growth is told from them.

    Args:
        compute: computes a batch and waits for it.
        state_bytes: of the weights.
    """

    def __init__(self, compute: Callable[[Any], object], state_bytes: int) -> None:
        self._compute = compute
        self._peaks: dict[int, int] = {}
        self.state_bytes = state_bytes
        self.largest_bytes = self.gradient_bytes = self.cast_bytes = self.window_bytes = 0
        self.other_bytes = active_bytes() - state_bytes

    def peak(self, batch: Any, num_rows: int) -> int:
        """The most bytes that are live while the first rows are computed."""
        if num_rows not in self._peaks:
            rows = rows_between(batch, 0, num_rows)
            self._compute(rows)  # while MLX traces, work is done and freed in between
            with measured_peak() as peak:
                for _ in range(STEADY):
                    self._compute(rows)
            self._peaks[num_rows] = peak.num_bytes
        return self._peaks[num_rows]

    def gradient_peak(self, batch: Any, num_rows: int) -> int:
        """There are no gradients: the same."""
        return self.peak(batch, num_rows)
