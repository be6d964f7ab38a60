"""Lazy logs: the running sums of an epoch stay on the device until somebody looks at them.

Everything that is logged is a weighted sum, divided once, when it is read. The step packs all sums
of a batch into one float32 vector; a :class:`Layout` says which part belongs to which key. The
vectors wait on the device until somebody looks, or there are many; then the host adds them up, and
:class:`Logs` turns them into Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError

State = dict[str, np.ndarray]
Entries = Mapping[str, Mapping[str, mx.array]]
Compute = Callable[[State], Any]
FOLD = 64  # vectors that wait on the device before the host adds them up unasked
Slices = dict[str, dict[str, tuple[int, tuple[int, ...]]]]  # key -> name -> (start, shape)


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


def unlogged(state: State) -> None:
    """How a key is computed that nobody is shown."""


class Layout:
    """Which part of the packed vector belongs to which key, fixed when the step is first traced.

    Attributes:
        computes: key -> function from its state (name -> float64 array) to its value.
        slices: key -> name -> where its numbers start, and their shape.
    """

    def __init__(self) -> None:
        self.computes: dict[str, Compute] = {}
        self.slices: Slices = {}
        self._lanes: dict[str, list[int]] = {}
        self._may_change = False  # it comes from a checkpoint, whose metrics may have been others

    def assign(
        self, entries: Mapping[str, Mapping[str, mx.array]], computes: Mapping[str, Compute]
    ) -> int:
        """Give every number of ``entries`` its place, and return how many there are.

        Raises:
            ConfigurationError: a key that was there before is missing or has another size.
        """
        slices: Slices = {}
        size = 0
        for key, state in entries.items():
            slices[key] = {}
            for name, value in state.items():
                slices[key][name] = (size, tuple(value.shape))
                size += value.size
        if self._may_change:
            self._may_change = False
            if slices != self.slices:
                before, self.slices, self._lanes = self.slices, slices, {}
                raise _LayoutChanged(before)
        for key, known in self.slices.items():
            if slices.get(key) != known:
                raise ConfigurationError(
                    f"{key!r} was logged with other sizes, or not at all, for a batch of another "
                    "shape. Metrics and objectives must return the same values for every batch."
                )
        self.slices, self._lanes = slices, {}
        self.computes = dict(computes)
        return size

    def plain(self) -> dict[str, Any]:
        """Where everything is, as plain values."""
        return {
            key: {name: [start, list(shape)] for name, (start, shape) in state.items()}
            for key, state in self.slices.items()
        }

    def expect_plain(self, slices: Mapping[str, Any]) -> None:
        """Take over the places that :meth:`plain` gave, until the first trace says otherwise."""
        self.expect(
            {
                key: {name: (start, tuple(shape)) for name, (start, shape) in entry.items()}
                for key, entry in slices.items()
            }
        )

    def expect(self, slices: Slices) -> None:
        """Take over the places of a checkpoint's sums, until the first trace says otherwise."""
        self.slices, self._lanes = slices, {}
        self._may_change = not self.computes

    @property
    def summed(self) -> list[str]:
        """Keys whose state is a sum, which is all of them but metrics that need every row."""
        return list(self.slices)

    def lanes(self, key: str) -> list[int]:
        """Where all numbers of a key's state are in the vector."""
        if key not in self._lanes:
            entry = self.slices.get(key, {})
            places = [range(start, start + math.prod(shape)) for start, shape in entry.values()]
            self._lanes[key] = [lane for place in places for lane in place]
        return self._lanes[key]

    def start(self, key: str, name: str) -> int:
        """Where the numbers of a state's entry begin in the vector."""
        return self.slices[key][name][0]

    def value(self, key: str, vector: np.ndarray) -> Any:
        """The value of ``key`` from packed float64 sums, or None where nothing was counted."""
        state = {
            name: vector[start : start + math.prod(shape)].reshape(shape)
            for name, (start, shape) in self.slices[key].items()
        }
        return self.computes[key](state)


def total_of(totals: np.ndarray, vectors: Sequence[mx.array]) -> np.ndarray:
    """Packed float64 sums plus more vectors. Host synchronisation with the step of the last one.

    One after the other, so that the bits do not depend on how many are added at a time.
    """
    buffers: Any = vectors  # what MLX's type stubs do not say that its arrays are
    if all(vector.size == totals.size for vector in vectors):
        rows = np.empty((len(vectors) + 1, totals.size))
        rows[0] = totals
        # Through views, which know of strides: what MLX hands out as bytes is plain memory.
        parts = b"".join([memoryview(buffer).tobytes() for buffer in buffers])
        rows[1:] = np.frombuffer(parts, np.float32).reshape(len(vectors), totals.size)
        return np.add.reduce(rows, 0)
    totals = totals.copy()
    for vector in vectors:  # lanes were added in between
        totals[: vector.size] += np.array(vector, copy=False)
    return totals


class Rows:
    """The rows of metrics that need every one (AUROC), batch by batch, on the device.

    Attributes:
        num_batches: how many batches.
        is_joined: whether they are the rows of all ranks, and not of this one alone.
        batches: key -> name -> arrays.
        newest: the last batch's.
    """

    def __init__(self) -> None:
        self.num_batches = 0
        self.is_joined = False
        self.batches: dict[str, dict[str, list[mx.array]]] = {}
        self.newest: Mapping[str, Mapping[str, mx.array]] = {}

    def append(self, rows: Mapping[str, Mapping[str, mx.array]]) -> None:
        """Keep one batch's rows: key -> name -> array."""
        self.num_batches += 1
        self.newest = rows
        for key, state in rows.items():
            for name, array in state.items():
                self.batches.setdefault(key, {}).setdefault(name, []).append(array)

    def take_back(self, count: int) -> None:
        """Forget the rows of the newest batches."""
        self.num_batches -= count
        for state in self.batches.values() if count else ():
            for arrays in state.values():
                del arrays[-count:]

    def joined(self) -> dict[str, dict[str, mx.array]]:
        """All of them so far: key -> name -> array."""
        return {
            key: {name: mx.concatenate(arrays) for name, arrays in state.items()}
            for key, state in self.batches.items()
        }

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
        read: gives the packed sums, float64 of shape ``(capacity,)``, when they are first needed.
        rows: rows of metrics that need every one.
        first, last: which batches of them count.
    """

    def __init__(
        self,
        layout: Layout,
        read: Callable[[], np.ndarray],
        rows: Rows,
        first: int,
        last: int,
    ) -> None:
        self._layout = layout
        self._read = read
        self._rows = rows
        self._span = first, last
        self._cache: dict[str, Any] = {}
        self._vector: np.ndarray | None = None

    @property
    def vector(self) -> np.ndarray:
        """The packed sums in float64. Host synchronisation: waits for the step that made them."""
        if self._vector is None:
            self._vector = self._read()
        return self._vector

    def _value(self, key: str) -> Any:
        if key not in self._cache:
            self._cache[key] = self._compute(key)
        return self._cache[key]

    def _compute(self, key: str) -> Any:
        if key in self._rows.batches:
            first, last = self._span
            return self._layout.computes[key](self._rows.read(key, first, last))
        if key not in self._layout.summed:
            return None
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


class _LayoutChanged(Exception):
    """The metrics are others than in the checkpoint; ``before`` says where its sums are."""

    def __init__(self, before: Slices) -> None:
        self.before = before


class Sums:
    """Sums of one pass over data, with what is needed to read them.

    The packing of a batch is written so that MLX compiles it into one kernel: every number has a
    lane of one short vector, and only elementwise operations touch it.

    Attributes:
        lanes: the numbers of the lanes, 0 to ``capacity - 1``.
        totals: float64 sums of the vectors that were folded; never changed in place.
        pending: the vectors since then, on the device, in order.
        tags: a number for each of them, which :meth:`first_bad` tells.
        batch: the packed sums of the last batch, None before the first.
        open: vectors of a window that waits for other ranks: this rank's part of it. They show in
            the logs of its batches, and count only when the sums of all ranks take their place.
        rows: rows of metrics that need every one.
        watched: the key whose sums must be finite, or None.
        totals_kept: the totals at the places that :meth:`keep` has marked and a fold has passed.
    """

    def __init__(self) -> None:
        self.layout = Layout()
        self.capacity = 32  # lanes at first; they grow where metrics need more
        self.lanes = _lanes(self.capacity)  # made here: inside a trace it would be work
        self.watched: str | None = None
        self._kept: dict[str, Any] = {}  # a checkpoint's values, until a trace tells how to compute
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self.totals = np.zeros(self.capacity)
        self.pending: list[mx.array] = []
        self.tags: list[int] = []
        self.open: list[mx.array] = []
        self.num_folded = 0
        self.totals_kept: list[np.ndarray] = []
        self._marks: list[int] = []
        self._num_checked = 0
        self._first_bad: tuple[int, float] | None = None
        self.batch: mx.array | None = None
        self.rows = Rows()
        self._kept = {}

    @property
    def capacity_in_use(self) -> int:
        """Lanes of its vectors; 0 before it is known what they hold."""
        return self.capacity if self.layout.slices else 0

    @property
    def num_added(self) -> int:
        """Vectors so far."""
        return self.num_folded + len(self.pending)

    def fold(self, upto: int | None = None) -> np.ndarray:
        """Add the first vectors, up to number ``upto``, to the totals, and return these.

        Host synchronisation with the step that made the last of them.
        """
        end = self.num_added if upto is None else upto
        self.first_bad(end)
        while self._marks and self._marks[0] <= end:
            self._add_up(self._marks.pop(0))
            self.totals_kept.append(self.totals)
        self._add_up(end)
        return self.totals

    def _add_up(self, upto: int) -> None:
        count = upto - self.num_folded
        if count > 0:
            vectors = self.pending[:count]
            del self.pending[:count], self.tags[:count]
            self.num_folded += count
            self.totals = total_of(self.totals, vectors)

    def keep(self) -> None:
        """Have the totals of now kept, however late they are added up."""
        self._marks.append(self.num_added)

    def first_bad(self, upto: int) -> tuple[int, float] | None:
        """Tag and value of the first vector, up to number ``upto``, that is not finite, or None.

        Host synchronisation with the step that made the last of them. Nothing is added up for it:
        between steps NumPy finds its code out of the cache, and a few numbers are read sooner.
        """
        start, count = self._num_checked, upto - self._num_checked
        if self.watched is None or self._first_bad is not None or count <= 0:
            return self._first_bad
        lanes = self.layout.lanes(self.watched)
        vectors: Any = self.pending[start - self.num_folded :][:count]
        for number, vector in enumerate(vectors, start - self.num_folded):
            numbers = memoryview(vector)
            if not all(math.isfinite(numbers[lane]) for lane in lanes):
                loss = self.layout.value(self.watched, np.array(vector, np.float64))
                self._first_bad = self.tags[number], math.nan if loss is None else loss
                break
        self._num_checked = upto
        return self._first_bad

    def mark(self) -> tuple[int, int, int]:
        """Where it is now, for :meth:`back_to`."""
        return self.num_added, len(self.open), self.rows.num_batches

    def back_to(self, mark: tuple[int, int, int]) -> None:
        """Forget what was added since :meth:`mark`, of which nothing may be folded."""
        num_added, num_open, num_batches = mark
        del self.pending[num_added - self.num_folded :], self.tags[num_added - self.num_folded :]
        del self.open[num_open:]
        self.rows.take_back(self.rows.num_batches - num_batches)

    def state_dict(self) -> dict[str, Any]:
        """What was counted, for a checkpoint. Host synchronisation."""
        values = {key: getattr(v, "tolist", lambda v=v: v)() for key, v in self.values().items()}
        totals, slices = self.fold().tolist(), self.layout.plain()
        return {"totals": totals, "slices": slices, "rows": self.rows.joined(), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from what :meth:`state_dict` gave."""
        self.capacity = len(state["totals"])
        self.lanes = _lanes(self.capacity)
        self.restart()
        self.totals = np.array(state["totals"], np.float64)
        self.layout.expect_plain(state["slices"])
        if state["rows"]:
            self.rows.append(state["rows"])
        self._kept = dict(state["values"])

    def extend_batch(self, vector: mx.array) -> None:
        """Put what an update has logged into the newest batch's vector."""
        both = self.pad(self.pending[-1]) + self.pad(vector)
        self.pending[-1] = self.batch = both

    def pad(self, vector: mx.array) -> mx.array:
        """A vector with as many lanes as there are now."""
        missing = self.capacity - vector.size
        return mx.pad(vector, (0, missing)) if missing else vector

    def widen(self, capacity: int) -> None:
        """Have at least so many lanes from now on."""
        if capacity > self.capacity:
            self._widen(capacity)

    def values(self) -> Mapping[str, Any]:
        """Means over the pass so far."""
        if not self.layout.computes:
            return self._kept
        if not self.num_added and not self.totals.any():
            return {}
        return Values(self.layout, self.fold, self.rows, 0, self.rows.num_batches)

    def pack(self, entries: Entries, computes: Mapping[str, Compute]) -> mx.array:
        """The vector of a batch. Runs while tracing."""
        size = self.layout.assign(entries, computes)
        if size > self.capacity:
            raise _CapacityError(size)
        return self.place(entries)

    def place(self, entries: Entries) -> mx.array:
        """A vector with ``entries`` in their lanes and zeros elsewhere. Runs while tracing."""
        parts = []
        for key, state in entries.items():
            for name, value in state.items():
                start, value = self.layout.start(key, name), value.astype(mx.float32)
                if value.ndim == 0:
                    parts.append(mx.where(self.lanes == FIRST_LANE + start, value, 0.0))
                else:
                    padding = (start, self.capacity - start - value.size)
                    parts.append(mx.pad(value.reshape(-1), padding))
        while len(parts) > 1:  # a tree, because compiled kernels have a limited depth
            pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
            parts = pairs + parts[len(parts) - len(parts) % 2 :]
        return parts[0]

    def growing(self, trace: Callable[[], Any]) -> Any:
        """Call what packs, with more lanes if these prove too few."""
        while True:
            try:
                return trace()
            except _CapacityError as error:
                self._widen(error.needed)
            except _LayoutChanged as change:
                self._move(change.before)

    def _widen(self, needed: int) -> None:
        self.fold()  # in the present layout
        self.capacity = -(-needed // 32) * 32
        self.lanes = _lanes(self.capacity)
        self.totals = np.pad(self.totals, (0, self.capacity - self.totals.size))

    def _move(self, before: Slices) -> None:
        """Sums of a checkpoint go to their places in the present layout; others start at 0."""
        old, self.totals = self.totals, np.zeros(self.capacity)
        for key, state in self.layout.slices.items():
            for name, (start, shape) in state.items():
                source, known = before.get(key, {}).get(name, (0, None))
                size = math.prod(shape)
                if start + size > self.totals.size:
                    self._widen(start + size)
                if known == shape:
                    self.totals[start : start + size] = old[source : source + size]


# MLX (0.32.4) names a compiled kernel by its constants' digits, nothing between them, and keeps it
# for other processes: lane 13 with weight 3 got the kernel of lane 1 with weight 33. So all lanes
# have six digits.
FIRST_LANE = 100_000


def _lanes(capacity: int) -> mx.array:
    lanes = mx.arange(FIRST_LANE, FIRST_LANE + capacity)
    mx.eval(lanes)  # a lazy array could be used by this thread only
    return lanes


class Logs(MutableMapping[str, Any]):
    """What a batch hook is told, read from the device only when it is asked for.

    ``logs["loss"]`` is the mean so far, ``logs.batch["loss"]`` this batch's own. One object
    is shared by all callbacks of one call, and they may add to it.
    """

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self._layout, self._rows, self._batch = sums.layout, sums.rows, sums.batch
        self._num_batches = sums.rows.num_batches
        # What is needed should somebody keep this object and look when the sums have gone on.
        self._totals, self._vectors = sums.totals, sums.pending[:]
        self._count = sums.num_folded + len(sums.pending)
        self._open = sums.open[:]
        self._own: dict[str, Any] = {}
        self._gone: set[str] = set()

    def _read(self) -> np.ndarray:
        if self._sums.rows is self._rows and self._sums.num_added == self._count:
            found = self._sums.fold()
        else:
            found = total_of(self._totals, self._vectors)
        return total_of(found, self._open) if self._open else found

    @cached_property
    def running(self) -> Mapping[str, Any]:
        """Means over the pass so far."""
        return self._values(self._read, self._count or self._open, 0)

    @cached_property
    def batch(self) -> Mapping[str, Any]:
        """The last batch's own values."""
        batch = self._batch

        def read() -> np.ndarray:
            return np.array(batch, np.float64)

        return self._values(read, batch is not None, max(self._num_batches - 1, 0))

    def _values(self, read: Callable[[], np.ndarray], exists: Any, first: int) -> Mapping[str, Any]:
        return Values(self._layout, read, self._rows, first, self._num_batches) if exists else {}

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
