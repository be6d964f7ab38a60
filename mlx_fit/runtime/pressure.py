"""Whether the system is short of memory, as far as it tells."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

STALLED_PERCENT = 10.0  # of the last 10 seconds, in which some process waited for memory
SWAPPED_BYTES = 256 << 20  # written to swap since the watch began
FREE_PERCENT = 10  # of macOS's own measure
_PAGE_BYTES = 4096  # of /proc/vmstat's counters, whatever the size of large pages


def stalled_percent(root: Path = Path("/")) -> float | None:
    """Share of the last 10 seconds in which a process waited for memory; None where unknown.

    Linux's pressure stall information: ``some avg10`` of ``/proc/pressure/memory``.
    """
    found = re.search(r"^some avg10=([\d.]+)", _text(root / "proc/pressure/memory"), re.MULTILINE)
    return float(found[1]) if found else None


def swapped_out_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that Linux has written to swap since it started; None where unknown."""
    found = re.search(r"^pswpout (\d+)$", _text(root / "proc/vmstat"), re.MULTILINE)
    return int(found[1]) * _PAGE_BYTES if found else None


def free_percent_of(text: str) -> int | None:
    """What macOS's ``memory_pressure -Q`` says is free, in percent."""
    found = re.search(r"free percentage:\s*(\d+)%", text)
    return int(found[1]) if found else None


def swapped_out_bytes_of(text: str) -> int | None:
    """What macOS's ``vm_stat`` says was written to swap, in bytes."""
    page, swapped = (
        re.search(r"page size of (\d+) bytes", text),
        re.search(r"Swapouts:\s*(\d+)", text),
    )
    return int(page[1]) * int(swapped[1]) if page and swapped else None


class PressureWatch:
    """Notices when the system runs short of memory while this process trains."""

    def __init__(self) -> None:
        self._swapped_before = _swapped()

    def found(self) -> str:
        """What is wrong now, in words; empty if nothing is, or nothing is known."""
        swapped = _swapped()
        if swapped is not None and self._swapped_before is not None:
            grown = swapped - self._swapped_before
            if grown > SWAPPED_BYTES:
                return f"{grown >> 20} MiB were written to swap since training began"
        if sys.platform == "darwin":
            free = free_percent_of(_output("memory_pressure", "-Q"))
            if free is not None and free < FREE_PERCENT:
                return f"only {free} % of memory are free"
            return ""
        stalled = stalled_percent()
        if stalled is not None and stalled > STALLED_PERCENT:
            return f"processes waited for memory in {stalled:.0f} % of the last 10 seconds"
        return ""


def _swapped() -> int | None:
    if sys.platform == "darwin":
        return swapped_out_bytes_of(_output("vm_stat"))
    return swapped_out_bytes()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
