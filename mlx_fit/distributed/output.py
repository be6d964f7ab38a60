"""What ranks print, line by line: to the terminal, to files, and its end for the last word."""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from pathlib import Path
from typing import BinaryIO

from mlx_fit.errors import ConfigurationError

STYLES = ("prefixed", "merged", "rank0")
_KEPT_LINES = 300
_LONGEST = 1 << 16


class Output:
    """Where the lines of ranks go.

    Args:
        style: ``"prefixed"`` puts ``[rank]`` before each line, ``"merged"`` nothing, ``"rank0"``
            shows rank 0's alone.
        log_dir: folder for ``rank_0.log`` and so on, with all that each rank printed.
        num_logs: how many of these.

    Raises:
        ConfigurationError: they cannot be written.
    """

    def __init__(
        self, style: str = "prefixed", log_dir: Path | None = None, num_logs: int = 0
    ) -> None:
        self._style = style
        self._logs: dict[int, BinaryIO] = {}
        self._parts: dict[tuple[int, int], bytes] = {}
        self._ends: dict[int, deque[bytes]] = {}
        self._is_closed = {1: False, 2: False}
        if log_dir is not None:
            self._open(log_dir, num_logs)

    def _open(self, folder: Path, number: int) -> None:
        """Open all logs, so that what is wrong shows before a rank is started."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank in range(number):
                self._logs[rank] = (folder / f"rank_{rank}.log").open("ab")
        except OSError as error:
            self.close()
            raise ConfigurationError(
                f"log_dir={str(folder)!r}: {error.filename} cannot be written ({error.strerror}); "
                "expected a folder that is there or can be made, and may be written."
            ) from error

    def add(self, rank: int, stream: int, data: bytes) -> None:
        """``rank`` printed ``data`` to ``stream``, 1 or 2."""
        if rank in self._logs:
            self._log(rank, data)
        text = self._parts.pop((rank, stream), b"") + data
        # A bar that redraws itself ends its lines with a carriage return.
        cut = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if len(text) - cut > _LONGEST:
            cut = len(text)
        for line in text[:cut].splitlines(keepends=True):
            self._show(rank, stream, line)
        if text[cut:]:
            self._parts[rank, stream] = text[cut:]

    def finish(self, rank: int) -> None:
        """``rank`` has ended: show what had no line end yet."""
        for stream in (1, 2):
            if part := self._parts.pop((rank, stream), b""):
                self._show(rank, stream, part + b"\n")

    def say(self, text: str) -> None:
        """Show a line of the launcher's own."""
        self._write(2, f"mlx-fit launch: {text}\n".encode())

    def traceback_of(self, rank: int) -> list[str]:
        """The last traceback that ``rank`` printed to standard error, else its last lines."""
        lines = [line.decode(errors="replace").rstrip() for line in self._ends.get(rank, ())]
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
        return lines[starts[-1] :] if starts else lines[-20:]

    def forget(self) -> None:
        """The ranks start again: what they printed so far is not their last word."""
        self._ends.clear()

    def close(self) -> None:
        """Close the files."""
        for log in self._logs.values():
            log.close()

    def _log(self, rank: int, data: bytes) -> None:
        """Write to a rank's file. Where the disk is full the run goes on without it."""
        log = self._logs[rank]
        try:
            log.write(data)
            log.flush()
        except OSError as error:
            self.say(f"{log.name} ends here ({error.strerror}); the run goes on.")
            with contextlib.suppress(OSError):
                self._logs.pop(rank).close()

    def _show(self, rank: int, stream: int, line: bytes) -> None:
        if stream == 2:
            self._ends.setdefault(rank, deque(maxlen=_KEPT_LINES)).append(line)
        if self._style == "rank0" and rank:
            return
        self._write(stream, f"[{rank}] ".encode() + line if self._style == "prefixed" else line)

    def _write(self, stream: int, data: bytes) -> None:
        """Write all of it. Once nobody reads any more, ranks go on unseen."""
        while data and not self._is_closed[stream]:
            try:
                data = data[os.write(stream, data) :]
            except BlockingIOError:
                select.select([], [stream], [], 1.0)
            except OSError:
                self._is_closed[stream] = True
