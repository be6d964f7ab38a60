"""How much memory MLX holds, and how much it may hold."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_fit.errors import ConfigurationError

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?I?B)\s*", re.IGNORECASE)


def active_bytes() -> int:
    """Bytes in live arrays."""
    return mx.get_active_memory()


def cache_bytes() -> int:
    """Bytes that MLX keeps for its next allocations."""
    return mx.get_cache_memory()


@dataclass
class Peak:
    """The highest :func:`active_bytes` of a stretch of work."""

    num_bytes: int = 0


_earlier = Peak()  # before a measurement, which resets MLX's own counter


def peak_bytes() -> int:
    """The highest :func:`active_bytes` since the start, or since :func:`reset_peak`."""
    return max(mx.get_peak_memory(), _earlier.num_bytes)


def reset_peak() -> None:
    """Let :func:`peak_bytes` begin anew."""
    mx.reset_peak_memory()
    _earlier.num_bytes = 0


@contextmanager
def measured_peak() -> Iterator[Peak]:
    """The peak of what is evaluated inside; :func:`peak_bytes` stays that of the whole process."""
    peak = Peak()
    _earlier.num_bytes = peak_bytes()
    mx.reset_peak_memory()
    try:
        yield peak
    finally:
        peak.num_bytes = mx.get_peak_memory()


def limit_bytes() -> int:
    """The most bytes that MLX can safely hold on the default device: the least of :func:`limits`.

    On CPU, an allocation that fails ends the process without an exception.
    """
    return min(limits().values())


def limits() -> dict[str, int]:
    """What limits the bytes that MLX can hold on the default device, by name.

    MLX's own limit (``mx.set_memory_limit``), what the device has, and for a CPU on Linux what the
    machine, the control groups of this process (container, batch job) and its address space
    (``ulimit -v``) have left beyond what MLX holds already. Where other ranks of a distributed run
    are on this machine, also this one's share of what all of them hold and can still get.
    """
    found = {"memory_limit": mx.get_memory_limit(), **_of_machine()}
    if _share.num_bytes is not None:
        found["this rank's share of what its machine or container has"] = _share.num_bytes
    if (free := address_space_left()) is not None:
        # What MLX keeps for reuse stays mapped: it may be of the wrong sizes.
        found["the address space of the process (ulimit -v)"] = active_bytes() + free
    return found


def _of_machine() -> dict[str, int]:
    """Those limits that processes on one machine have in common."""
    held = active_bytes() + cache_bytes()
    found = {}
    if mx.default_device().type != mx.DeviceType.cpu:
        facts = mx.device_info()
        # Metal tells the first, CUDA the others; free memory excludes what MLX itself holds.
        for key, mine in (
            ("max_recommended_working_set_size", 0),
            ("total_memory", 0),
            ("free_memory", held),
        ):
            if key in facts:
                found[f"the device's {key}"] = int(facts[key]) + mine
    elif sys.platform.startswith("linux"):
        left = _left_on_linux()
        if left:
            found["what the machine or its container has left"] = held + min(left)
    return found


@dataclass
class Share:
    """What this process may hold of its machine's memory; None: all of it."""

    num_bytes: int | None = None


_share = Share()


def set_share(num_bytes: int | None) -> None:
    """Limit this process to its share of its machine, or not: other ranks need the rest."""
    _share.num_bytes = num_bytes


def room() -> tuple[int, int | None]:
    """Bytes that MLX holds, and those that it could still get from its machine.

    None where nothing tells the latter.
    """
    held = active_bytes() + cache_bytes()
    least = min(_of_machine().values(), default=None)
    return held, None if least is None else max(0, least - held)


def address_space_left() -> int | None:
    """Bytes that this process may still map; None where that has no limit."""
    if not sys.platform.startswith("linux"):
        return None
    import resource  # not on every system

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    return max(0, soft - num_pages * os.sysconf("SC_PAGE_SIZE"))


def process_rss_bytes() -> int:
    """Resident memory of this process: MLX's arrays on CPU, Python objects, libraries."""
    if sys.platform.startswith("linux"):
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")
    import subprocess  # slow to import, and needed on macOS only

    kibibytes = subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])
    return int(kibibytes) * 1024


def format_bytes(num_bytes: int) -> str:
    """A size as people read it, in powers of 1024.

    >>> format_bytes(1_610_612_736), format_bytes(812)
    ('1.5 GiB', '812 B')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        # The next unit also for what would round to 1024.0 of this one.
        if abs(size) < 1023.95 or unit == "TiB":
            break
        size /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def parse_bytes(size: int | str, argument: str) -> int:
    """Bytes from a number or a text such as ``"8GB"`` (10**9) or ``"512MiB"`` (2**20).

    Args:
        size: the size. Upper and lower case, and a space before the unit, are the same.
        argument: name of the argument it was given as, for the message.

    Raises:
        ConfigurationError: neither an int >= 0 nor such a text.

    >>> parse_bytes("1.5 GiB", "memory_limit")
    1610612736
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigurationError(
            f"{argument}={size!r} is not a size: give bytes as an int >= 0, or a number with a "
            "unit such as '8GB' or '512MiB'."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _left_on_linux(root: Path = Path("/")) -> list[int]:
    """Bytes the machine and each control group above this process can still give."""
    left = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
    for group, limit, usage, statistic in _control_groups(root):
        maximum = _number(group / limit)
        if maximum is not None:
            used = (_number(group / usage) or 0) - _reclaimable(group, statistic)
            left.append(max(0, maximum - used))
    return left


def _control_groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """Folders of this process's memory groups up to the root, with the file names of v1 or v2."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            top = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the name may be that of the host: then only the top is there.
        folder = top / name.strip("/")
        for group in [folder, *folder.parents]:
            found.append((group, *names))
            if group == top:
                break
    return found


def _reclaimable(group: Path, statistic: str) -> int:
    """Bytes of file cache that the kernel drops when the group needs memory."""
    for line in _lines(group / "memory.stat"):
        key, value = line.split()
        if key == statistic:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
