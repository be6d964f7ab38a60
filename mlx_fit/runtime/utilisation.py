"""How busy the GPU is, where the system tells it without special rights."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence

_NVIDIA = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
_APPLE = ("ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")


def gpu_command() -> tuple[str, ...] | None:
    """The command that tells how busy the GPU is, or None where there is none."""
    command = _APPLE if sys.platform == "darwin" else _NVIDIA
    return command if shutil.which(command[0]) else None


def gpu_percent(command: Sequence[str]) -> float | None:
    """Utilisation of the busiest GPU in percent, or None where it cannot be read.

    Args:
        command: from :func:`gpu_command`. It takes some 20 ms: not for every step.
    """
    import subprocess  # slow to import

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_gpu_percent(done.stdout)


def parse_gpu_percent(text: str) -> float | None:
    """The number in the output of nvidia-smi (one line per GPU) or of macOS's ioreg.

    >>> parse_gpu_percent('12\\n97\\n'), parse_gpu_percent('"Device Utilization %"=42,"x"=1')
    (97.0, 42.0)
    """
    found = re.findall(r'^\s*(\d+)\s*$|"Device Utilization %"\s*=\s*(\d+)', text, re.MULTILINE)
    return max((float(a or b) for a, b in found), default=None)
