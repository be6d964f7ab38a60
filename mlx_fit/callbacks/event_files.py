"""TensorBoard's event files: writing them with tensorboardX, and cutting off what is void."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATTERN = "events.out.tfevents.*"


def open_writer(folder: Path) -> Any:
    """A tensorboardX writer with a file of its own in ``folder``."""
    from tensorboardX import SummaryWriter

    # tensorboardX names files by the second: two writers of one second would collide. TensorBoard
    # reads files in the order of their names, so the suffix goes up with time.
    suffix = f".{time.time_ns():020d}.{os.urandom(4).hex()}"
    return SummaryWriter(str(folder), filename_suffix=suffix)


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
