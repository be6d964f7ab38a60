"""Starts real processes, one for each rank, over MLX's ring on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from control_ranks import free_ports

import mlx_fit

HERE = Path(__file__).parent
ROOT = Path(mlx_fit.__file__).parent.parent
LIMIT_SECONDS = 180  # of a set of processes, which share two busy cores with other tests


def start(size, arguments, folder):
    """The processes of a group, by rank; standard error goes to ``rank<r>.err``."""
    hosts = folder / f"hosts{size}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    processes = []
    for rank in range(size):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE)]),
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(hosts),
        }
        with (folder / f"rank{rank}.err").open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            )
    return processes


def end(processes, seconds=LIMIT_SECONDS):
    """Exit codes by rank; whatever still runs after ``seconds`` is killed."""
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [process.returncode for process in processes]


def run_cases(size, names, folder, script="rank_cases.py"):
    """What functions of a script return, on each rank: name -> list by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = start(size, [HERE / script, folder, *names], folder)
    codes = end(processes)
    errors = "".join((folder / f"rank{rank}.err").read_text()[-3000:] for rank in range(size))
    assert codes == [0] * size, f"exit codes {codes}\n{errors}"
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    return {name: [each[name] for each in found] for name in names}
