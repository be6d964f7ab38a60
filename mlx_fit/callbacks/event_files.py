"""TensorBoard's event files: writing them with tensorboardX, and cutting off what is void."""

from __future__ import annotations

import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

PATTERN = "events.out.tfevents.*"


class EventFile:
    """A new event file in a folder, made of tensorboardX's records.

    tensorboardX's own writer sends every event through a queue between processes to a thread, and
    ``flush`` does not wait for them. Here an event is in the file, whole, when the call returns:
    it survives the process, and costs less. Where it cannot be written, on a full disk perhaps,
    a warning says so once, and training goes on without the file.

    Args:
        folder: where it goes; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._checksum = Event, Summary, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, so these go up with time.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now:020d}"
        self._file: BinaryIO | None = (folder / f"{name}.{os.urandom(4).hex()}").open("ab")
        self._write(Event(wall_time=now / 1e9, file_version="brain.Event:2"))

    def add(self, summary: Any, step: int = 0) -> None:
        """Write a summary of tensorboardX at a step."""
        self._write(self._event(wall_time=time.time(), step=int(step), summary=summary))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by their tags, as one event."""
        value = self._summary.Value
        pairs = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        self.add(self._summary(value=pairs), step)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # of what could not be written, which was said
                file.close()

    def _write(self, event: Any) -> None:
        if self._file is None:
            return
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        first, second = (struct.pack("<I", self._checksum(part)) for part in (length, body))
        try:
            self._file.write(length + first + body + second)
            self._file.flush()
        except OSError as error:
            warnings.warn(
                f"{self._file.name} cannot be written: {error}. Training goes on without it.",
                stacklevel=4,
            )
            self.close()


def purge(folder: Path, is_kept: Callable[[str, int], bool]) -> None:
    """Drop events of an earlier run from the files of a folder: those a resumed run writes anew.

    tensorboardX's ``purge_step`` would not do: it drops all events from one step on, whereas here
    some tags count epochs, some steps and some batches. A record that a killed process left
    incomplete is dropped as well.

    Args:
        folder: where event files may be; none of them open for writing.
        is_kept: whether an event stays, from its tag and its step.
    """
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob(PATTERN)):
        data, kept = path.read_bytes(), bytearray()
        for record, body in _records(data):
            event = Event.FromString(body)
            if all(is_kept(value.tag, event.step) for value in event.summary.value):
                kept += record
        if kept != data:
            staged = path.with_name(f".tmp-{path.name}")
            staged.write_bytes(kept)
            staged.replace(path)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The whole records of a TFRecord file and what they hold: length, checksum, data, checksum."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + length + 16
        if end > len(data):
            return
        yield data[start:end], data[start + 12 : end - 4]
        start = end
