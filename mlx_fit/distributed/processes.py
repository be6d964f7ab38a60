"""Ranks as processes: here, or behind a remote shell."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from mlx_fit.distributed.backends import Surroundings
from mlx_fit.distributed.environment import OF_A_RUN
from mlx_fit.errors import ConfigurationError

CONNECTION_LOST = 255  # ssh's exit code
_AGENT = Path(__file__).with_name("agent.py")
_PR_SET_PDEATHSIG = 1


class RankProcess(ABC):
    """A rank that was started.

    Attributes:
        rank: which one. host: where.
        code: what it ended with, negative for a signal; None while it runs.
        ended_at: when that was seen, by the monotonic clock.
        was_told: whether it was asked to end before it did.
        is_host_gone: whether its machine could not be reached any more.
    """

    def __init__(self, rank: int, host: str, process: subprocess.Popen[bytes]) -> None:
        self.rank = rank
        self.host = host
        self.code: int | None = None
        self.ended_at = 0.0
        self.was_told = False
        self.is_host_gone = False
        self._process = process

    @property
    def pipes(self) -> list[IO[bytes]]:
        """Standard output and standard error."""
        return [pipe for pipe in (self._process.stdout, self._process.stderr) if pipe is not None]

    def poll(self) -> bool:
        """Whether it runs. Once it does not, what it left of its process group is killed."""
        if self.code is None and (code := self._process.poll()) is not None:
            self.code, self.ended_at = code, time.monotonic()
            self._clean_up()
        return self.code is None

    def tell(self, number: signal.Signals) -> None:
        """Send SIGTERM, SIGINT or SIGKILL, if it still runs; SIGKILL to all it started as well."""
        if self.poll():
            self.was_told = self.was_told or number != signal.SIGINT
            self._send(number)

    @abstractmethod
    def _send(self, number: signal.Signals) -> None:
        """Bring a signal to the rank."""

    @abstractmethod
    def _clean_up(self) -> None:
        """It has ended: leave nothing of it."""


class LocalRank(RankProcess):
    """A rank on this machine, in a process group of its own; on Linux it dies with the launcher."""

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _clean_up(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)


class RemoteRank(RankProcess):
    """A rank behind a remote shell, whose agent obeys lines on its standard input."""

    def _send(self, number: signal.Signals) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(number.name.removeprefix("SIG").encode() + b"\n")
            self._process.stdin.flush()

    def give_up(self) -> None:
        """Its machine does not answer: end the remote shell."""
        if self.poll():
            self.is_host_gone = True
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _clean_up(self) -> None:
        self.is_host_gone = self.is_host_gone or self.code == CONNECTION_LOST
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if not self.is_host_gone and self.code is not None and self.code > 128:
            self.code = 128 - self.code  # the agent's way to say that a signal ended it


def start_here(
    rank: int, command: Sequence[str], variables: Mapping[str, str], surroundings: Surroundings
) -> LocalRank:
    """Start a rank on this machine. Files of ``surroundings`` have been written already.

    Raises:
        ConfigurationError: there is no such command.
    """
    environment = {k: v for k, v in os.environ.items() if k not in OF_A_RUN}
    environment |= {**variables, **surroundings.variables}
    launcher = os.getpid()
    library = ctypes.CDLL(None)  # looked up before the fork, after which little is safe

    def end_with_launcher() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=end_with_launcher if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise ConfigurationError(f"cannot run {command[0]!r}: {error.strerror}.") from error
    return LocalRank(rank, "localhost", process)


def start_there(
    rank: int,
    host: str,
    shell: str,
    python: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    surroundings: Surroundings,
) -> RemoteRank:
    """Start a rank on another machine, in a folder of the same name if there is one.

    Raises:
        ConfigurationError: there is no such remote shell.
    """
    job = {
        "command": list(command),
        "variables": {**variables, **surroundings.variables},
        "files": surroundings.files,
        "folder": os.getcwd(),
    }
    line = shlex.join([python, "-u", "-c", _AGENT.read_text(), json.dumps(job)])
    try:
        process = subprocess.Popen(
            [*shlex.split(shell), host, line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigurationError(f"cannot run {shell!r}: {error.strerror}.") from error
    return RemoteRank(rank, host, process)
