"""Batches and exceptions on their way between processes.

A batch is pickled with its arrays apart (protocol 5, PEP 574). Large arrays travel in a segment of
shared memory that the parent made, small ones beside the pickle.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_fit.errors import WorkerError, rebuilt

if TYPE_CHECKING:
    from multiprocessing.shared_memory import SharedMemory

__all__ = ["Failure", "Parcel", "Segment", "attach", "failure", "pack", "unpack"]

_LARGE = 1 << 15  # bytes; below it a pipe is as fast as shared memory
_PAGE = 1 << 12


class Parcel(NamedTuple):
    """A packed batch.

    Attributes:
        stream: the pickle, without the arrays.
        sizes: bytes of each array.
        inline: the arrays' bytes, or None if they are in the segment.
    """

    stream: bytes
    sizes: list[int]
    inline: list[bytearray] | None


def pack(value: Any, segment: memoryview | None) -> Parcel:
    """``value`` as a parcel, its arrays in ``segment`` where they are large and fit in it."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    total = sum(sizes)
    if segment is None or not _LARGE <= total <= segment.nbytes:
        return Parcel(stream, sizes, [bytearray(view) for view in views])
    start = 0
    for view, size in zip(views, sizes, strict=True):
        segment[start : start + size] = view
        start += size
    return Parcel(stream, sizes, None)


def unpack(parcel: Parcel, segment: memoryview | None) -> Any:
    """The value of a parcel, with memory of its own that can be written to."""
    if parcel.inline is not None:
        return pickle.loads(parcel.stream, buffers=parcel.inline)
    assert segment is not None
    buffers: list[Any] = []
    start = 0
    for size in parcel.sizes:
        buffers.append(np.array(np.frombuffer(segment, np.uint8, size, start)))
        start += size
    return pickle.loads(parcel.stream, buffers=buffers)


class Segment:
    """Shared memory for one batch at a time, made and removed by the parent.

    It grows after a parcel that did not fit; where the system has no room left for that (a
    container's small ``/dev/shm``), arrays go on travelling through the pipe.
    """

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._may_grow = True

    @property
    def name(self) -> str | None:
        """What a worker attaches by; None before there was anything large."""
        return None if self._memory is None else self._memory.name

    @property
    def view(self) -> memoryview | None:
        """The memory."""
        return None if self._memory is None else self._memory.buf

    def fit(self, parcel: Parcel) -> None:
        """Make the segment large enough for the next batch to be like ``parcel``."""
        total = sum(parcel.sizes)
        if parcel.inline is None or total < _LARGE or not self._may_grow:
            return
        from multiprocessing.shared_memory import SharedMemory  # slow to import

        self.close()
        size = -(-(total + total // 4) // _PAGE) * _PAGE
        memory = SharedMemory(create=True, size=size)
        try:
            _reserve(memory.name, size)
        except OSError:
            memory.close()
            memory.unlink()
            self._may_grow = False
        else:
            self._memory = memory

    def close(self) -> None:
        """Remove the segment from the system."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()
            memory.unlink()


def _reserve(name: str, size: int) -> None:
    """Have Linux set the memory aside now: else writing to a full one kills the process."""
    if sys.platform != "linux":
        return
    handle = os.open(f"/dev/shm/{name}", os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)


def attach(name: str | None, attached: dict[str, SharedMemory]) -> memoryview | None:
    """The memory of a segment, in a worker, which keeps what it has attached."""
    if name is None:
        return None
    if name not in attached:
        from multiprocessing.shared_memory import SharedMemory  # slow to import

        attached[name] = SharedMemory(name=name)
    return attached[name].buf


class Failure(NamedTuple):
    """An exception that was raised in a worker.

    Attributes:
        pickled: the exception, or None if it cannot be pickled.
        kind: its pickled class, or None.
        name: what its class is called.
        text: what it says.
        notes: added to it where it was raised.
        trace: the traceback.
    """

    pickled: bytes | None
    kind: bytes | None
    name: str
    text: str
    notes: list[str]
    trace: str

    def error(self, worker: int, pid: int | None) -> BaseException:
        """The exception again, of its type, with a note on where it was raised."""
        if self.pickled is not None:
            error = pickle.loads(self.pickled)
        elif self.kind is not None:
            error = rebuilt(pickle.loads(self.kind), (self.text,), {"__notes__": list(self.notes)})
        else:
            error = WorkerError(f"{self.name}: {self.text}", worker=worker)
            error.__notes__ = list(self.notes)
        error.add_note(f"Raised in worker {worker} (process {pid}):\n{self.trace.rstrip()}")
        return error


def failure(error: BaseException) -> Failure:
    """``error`` for the way to the parent."""
    import traceback  # slow to import

    trace = "".join(traceback.format_exception(error))
    notes = list(getattr(error, "__notes__", ()))
    kind = type(error)
    return Failure(_pickled(error), _pickled(kind), kind.__qualname__, str(error), notes, trace)


def _pickled(value: Any) -> bytes | None:
    """``value`` as bytes that give it back; None where pickling it loses something."""
    try:
        data = pickle.dumps(value)
        back = pickle.loads(data)
    except Exception:
        return None
    same = back is value or (type(back) is type(value) and str(back) == str(value))
    return data if same else None
