"""Lazy logs: the running sums of an epoch stay on the device until somebody looks at them.

Everything that is logged is a weighted sum, divided once, when it is read. The step packs all sums
of a batch into one float32 vector; a :class:`Layout` says which part belongs to which key, and
:class:`Logs` turns the vector into Python floats on demand. One look is one read of the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError

State = dict[str, np.ndarray]
Compute = Callable[[State], Any]


def total(state: State) -> float:
    """The plain sum."""
    return float(state["sum"])


def nonzero_total(state: State) -> float | None:
    """The plain sum, or None (not logged) while it is 0."""
    return total(state) or None


def divide(state: State) -> float | None:
    """``sum / weight``, or None where nothing was counted."""
    weight = float(state["weight"])
    return float(state["sum"]) / weight if weight else None


class Layout:
    """Which part of the packed vector belongs to which key, fixed when the step is first traced.

    Attributes:
        computes: key -> function from its state (name -> float64 array) to its value.
    """

    def __init__(self) -> None:
        self.computes: dict[str, Compute] = {}
        self._slices: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}

    def pack(
        self, entries: Mapping[str, Mapping[str, mx.array]], computes: Mapping[str, Compute]
    ) -> mx.array:
        """Put the sums of one batch into one float32 vector. Runs while the step is traced."""
        parts, slices, size = [], dict[str, dict[str, tuple[int, tuple[int, ...]]]](), 0
        for key, state in entries.items():
            slices[key] = {}
            for name, value in state.items():
                value = mx.array(value, dtype=mx.float32)
                slices[key][name] = (size, tuple(value.shape))
                size += value.size
                parts.append(value.reshape(-1))
        for key, known in self._slices.items():
            if slices.get(key) != known:
                raise ConfigurationError(
                    f"{key!r} was logged with other sizes, or not at all, for a batch of another "
                    "shape. Metrics and objectives must return the same values for every batch."
                )
        self._slices = slices
        self.computes = dict(computes)
        return mx.concatenate(parts)

    @property
    def summed(self) -> list[str]:
        """Keys whose state is a sum, which is all of them but metrics that need every row."""
        return list(self._slices)

    def place(self, entries: Mapping[str, Mapping[str, mx.array]], size: int) -> mx.array:
        """A vector of ``size`` numbers that holds only ``entries``, zeros elsewhere."""
        vector = mx.zeros((size,))
        for key, state in entries.items():
            for name, value in state.items():
                start, shape = self._slices[key][name]
                before, after = start, size - start - math.prod(shape)
                vector = vector + mx.pad(value.astype(mx.float32).reshape(-1), (before, after))
        return vector

    def value(self, key: str, vector: np.ndarray) -> Any:
        """The value of ``key`` from packed float64 sums, or None where nothing was counted."""
        state = {
            name: vector[start : start + math.prod(shape)].reshape(shape)
            for name, (start, shape) in self._slices[key].items()
        }
        return self.computes[key](state)


class Rows:
    """The rows of metrics that need every one (AUROC), batch by batch, on the device."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.batches: dict[str, dict[str, list[mx.array]]] = {}
        self.newest: Mapping[str, Mapping[str, mx.array]] = {}

    def append(self, rows: Mapping[str, Mapping[str, mx.array]]) -> None:
        """Keep one batch's rows: key -> name -> array."""
        self.num_batches += 1
        self.newest = rows
        for key, state in rows.items():
            for name, array in state.items():
                self.batches.setdefault(key, {}).setdefault(name, []).append(array)

    def read(self, key: str, start: int, stop: int) -> State:
        """Rows of the batches from ``start`` to ``stop``, joined. Reads the device."""
        return {
            name: np.concatenate([np.array(array, np.float64) for array in arrays[start:stop]])
            for name, arrays in self.batches[key].items()
        }


class Values(Mapping[str, Any]):
    """Values of packed sums, read from the device at the first look and kept.

    Args:
        layout: what the vector holds.
        sums: packed sums, shape ``(size,)``; or ``(2, size)``, where the second row carries the
            rounding errors of the first (compensated summation). None: nothing was counted yet.
        rows: rows of metrics that need every one.
        first, last: which batches of them count.
    """

    def __init__(
        self, layout: Layout, sums: mx.array | np.ndarray | None, rows: Rows, first: int, last: int
    ) -> None:
        self._layout = layout
        self._sums = sums
        self._rows = rows
        self._span = first, last
        self._cache: dict[str, Any] = {}
        self._vector: np.ndarray | None = None

    @property
    def vector(self) -> np.ndarray:
        """The packed sums in float64. Host synchronisation: waits for the step that made them."""
        if self._vector is None:
            vector = np.array(self._sums, dtype=np.float64)
            self._vector = vector.sum(0) if vector.ndim == 2 else vector
        return self._vector

    def _value(self, key: str) -> Any:
        if key not in self._cache:
            self._cache[key] = self._compute(key)
        return self._cache[key]

    def _compute(self, key: str) -> Any:
        if self._sums is None:
            return None
        if key in self._rows.batches:
            first, last = self._span
            return self._layout.computes[key](self._rows.read(key, first, last))
        return self._layout.value(key, self.vector)

    def __getitem__(self, key: str) -> Any:
        if key not in self._layout.computes or (value := self._value(key)) is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in self._layout.computes if self._value(key) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _CapacityError(Exception):
    """The packed vector is too short; ``needed`` numbers are wanted."""

    def __init__(self, needed: int) -> None:
        self.needed = needed


class Sums:
    """Running sums of one pass over data, on the device, with what is needed to read them.

    The sums are compensated (Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation
    endlicher Summen", 1974): row 0 is the float32 sum, row 1 its rounding errors.
    """

    def __init__(self) -> None:
        self.layout = Layout()
        self.capacity = 64  # numbers in the packed vector at first; it grows where metrics need it
        self.running = mx.zeros((2, self.capacity))
        self.batch: mx.array | None = None
        self.rows = Rows()

    def restart(self) -> None:
        """Forget what was counted."""
        self.running = mx.zeros((2, self.capacity))
        self.batch = None
        self.rows = Rows()

    def pack(
        self, entries: dict[str, dict[str, mx.array]], computes: dict[str, Compute]
    ) -> mx.array:
        """The packed vector of a batch, padded to the capacity. Runs while tracing."""
        vector = self.layout.pack(entries, computes)
        if vector.size > self.capacity:
            raise _CapacityError(vector.size)
        return mx.pad(vector, (0, self.capacity - vector.size))

    def place(self, entries: dict[str, dict[str, mx.array]]) -> mx.array:
        """A packed vector that holds only ``entries``, known from earlier, and zeros elsewhere."""
        return self.layout.place(entries, self.capacity)

    def growing(self, trace: Callable[[], Any]) -> Any:
        """Call what packs, with a longer vector if this one proves too short."""
        try:
            return trace()
        except _CapacityError as error:
            wider = -(-error.needed // 64) * 64
            self.running = mx.pad(self.running, [(0, 0), (0, wider - self.capacity)])
            self.capacity = wider
            return trace()


def add(running: mx.array, vector: mx.array) -> mx.array:
    """Add a batch's vector to the running sums without losing small contributions."""
    total, lost = running[0], running[1]
    new = total + vector
    back = new - total
    error = (total - (new - back)) + (vector - back)
    # A non-finite sum has no meaningful error term.
    return mx.stack([new, lost + mx.where(mx.isfinite(new), error, 0.0)])


class Logs(MutableMapping[str, Any]):
    """What a batch hook is told, read from the device only when it is asked for.

    ``logs["loss"]`` is the mean so far, ``logs.batch["loss"]`` this batch's own. One
    object is shared by all callbacks of one call, and they may add to it.
    """

    def __init__(self, sums: Sums) -> None:
        self._layout = sums.layout
        self._sums = sums.running, sums.batch
        self._rows = sums.rows
        self._num_batches = sums.rows.num_batches
        self._own: dict[str, Any] = {}
        self._gone: set[str] = set()

    @cached_property
    def running(self) -> Values:
        """Means over the pass so far."""
        running = None if self._sums[1] is None else self._sums[0]
        return Values(self._layout, running, self._rows, 0, self._num_batches)

    @cached_property
    def batch(self) -> Values:
        """The last batch's own values."""
        last = self._num_batches
        return Values(self._layout, self._sums[1], self._rows, max(last - 1, 0), last)

    def __getitem__(self, key: str) -> Any:
        if key in self._own:
            return self._own[key]
        if key in self._gone:
            raise KeyError(key)
        return self.running[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._own[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._own.pop(key, None)
        self._gone.add(key)

    def __iter__(self) -> Iterator[str]:
        for key in self.running:
            if key not in self._gone and key not in self._own:
                yield key
        yield from self._own

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Logs({dict(self)})"
