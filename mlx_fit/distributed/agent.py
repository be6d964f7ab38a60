"""Runs one rank on another machine, and ends it with the connection that started it.

Its text is sent through ssh and run by the Python there, so it needs the standard library alone.
It obeys lines on its standard input (TERM, INT, KILL); the end of that input means that the
launcher or the network is gone, and the rank ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

GRACE_SECONDS = 5.0


def main(job: dict[str, Any]) -> int:
    """Run ``job``: variables, files, folder, command; returns the exit code."""
    folder = tempfile.TemporaryDirectory(prefix="mlx_fit_")
    with folder:
        environment = dict(os.environ, **job["variables"])
        for name, text in job["files"].items():
            environment[name] = os.path.join(folder.name, name.lower() + ".json")
            with open(environment[name], "w") as file:
                file.write(text)
        try:
            rank = subprocess.Popen(
                job["command"],
                env=environment,
                cwd=job["folder"] if os.path.isdir(job["folder"]) else None,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            print(f"cannot run {job['command'][0]}: {error}", file=sys.stderr)
            return 2
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: _end(rank))
        threading.Thread(target=_obey, args=(rank,), daemon=True).start()
        code = rank.wait()
        _kill(rank)
        # 255 is what ssh says when the connection broke.
        return 128 - code if code < 0 else min(code, 254)


def _obey(rank: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin:
        order = line.strip()
        if order == "KILL":
            _kill(rank)
        elif order in ("TERM", "INT"):
            rank.send_signal(getattr(signal, "SIG" + order))
    _end(rank)


def _end(rank: subprocess.Popen[bytes]) -> None:
    rank.send_signal(signal.SIGTERM)
    timer = threading.Timer(GRACE_SECONDS, _kill, (rank,))
    timer.daemon = True
    timer.start()


def _kill(rank: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(rank.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
