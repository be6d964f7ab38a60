"""Real processes for the tests of control plane and launcher, ended whatever happens."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx_fit

HERE = Path(__file__).parent
LOOP = HERE / "control_loop.py"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_", "NCCL_"))},
    "PYTHONPATH": str(Path(mlx_fit.__file__).parents[1]),
    "MLX_FIT_BLAS": "off",
}


def free_ports(number):
    """Ports outside the range that outgoing connections use, in a row.

    The control plane's, 1,000 further on, are free as well.
    """
    while True:
        first = random.randrange(20000, 31000)
        ports = [*range(first, first + number)]
        if all(is_free(port) and is_free(port + 1000) for port in ports):
            return ports


def is_free(port):
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


class Rank:
    """One process: what it printed, and what it ended with."""

    def __init__(self, command, environment, folder, rank):
        self.rank = rank
        self.out = folder / f"out_{rank}"
        self.err = folder / f"err_{rank}"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    @property
    def rows(self):
        lines = self.out.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    @property
    def steps(self):
        return [row["step"] for row in self.rows if "pid" in row]

    @property
    def error(self):
        """What it said of its typed error, or {}."""
        return next((row for row in self.rows if "error" in row), {})

    def kill(self, number):
        self.process.send_signal(number)

    def wait_for(self, step, seconds=60):
        """Until it begins a step."""
        until = time.monotonic() + seconds
        while step not in self.steps:
            assert time.monotonic() < until, self.err.read_text()
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.02)


class Ranks:
    """Ranks of one run on loopback; leaving the ``with`` kills what is left."""

    def __init__(self, folder, number=2, started=None, at=None, hostfiles=None, **options):
        ports = free_ports(number)
        nodes = [[f"127.0.0.1:{port}"] for port in ports]
        path = folder / "hosts.json"
        path.write_text(json.dumps(nodes))
        options = {"size": number, "at": at, **options}
        self.ranks = []
        for rank in range(number) if started is None else started:
            environment = {**ENVIRONMENT, "MLX_HOSTFILE": str(path), "MLX_RANK": str(rank)}
            if hostfiles:  # behind a relay one rank sees another address of the other
                mine = folder / f"hosts_{rank}.json"
                mine.write_text(json.dumps(hostfiles[rank]))
                environment["MLX_HOSTFILE"] = str(mine)
            command = [sys.executable, str(LOOP), json.dumps(options)]
            self.ranks.append(Rank(command, environment, folder, rank))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
            rank.process.wait()

    def __getitem__(self, rank):
        return next(one for one in self.ranks if one.rank == rank)

    def end(self, *ranks, within=60):
        """Exit codes of these ranks (default all), all of which end in time."""
        until = time.monotonic() + within
        codes = []
        for rank in [self[r] for r in ranks] or self.ranks:
            try:
                codes.append(rank.process.wait(max(0.1, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(f"rank {rank.rank} hangs: {rank.err.read_text()[-2000:]}")
        return codes


TERM, STOP, CONT, KILL = signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL
