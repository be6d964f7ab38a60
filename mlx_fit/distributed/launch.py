"""Start the ranks of a run, watch over them, and start them again where that can help."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mlx_fit.checks import natural, number
from mlx_fit.distributed.backends import BACKENDS, STARTING_PORT, Surroundings, surroundings
from mlx_fit.distributed.environment import OF_A_RUN, RESTART, TOKEN
from mlx_fit.distributed.hosts import Host
from mlx_fit.distributed.mpi import start_mpi
from mlx_fit.distributed.outcome import PREEMPTED, Outcome, outcome_of
from mlx_fit.distributed.output import STYLES, Output
from mlx_fit.distributed.processes import RankProcess, RemoteRank, start_here, start_there
from mlx_fit.errors import ConfigurationError

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
_END_SECONDS = 2.0  # after a failure the others end by themselves, or are ended
_SAVE_SECONDS = 30.0  # the same after one was preempted: others may still be saving
_ANSWER_SECONDS = 3.0  # a machine that does not answer within this is gone


@dataclass(frozen=True)
class Job:
    """What to start, and how.

    Attributes:
        command: program and arguments; a ``.py`` file is run with ``python``.
        hosts: the machine of each rank.
        backend: ``"ring"``, ``"mpi"``, ``"nccl"`` or ``"jaccl"``.
        max_restarts: how often all ranks may be started again after one was lost.
        min_ranks: with how few, if a machine is gone; None: only with all.
        grace: seconds between SIGTERM and SIGKILL.
        shell: the remote shell's command, which gets a host and a line to run there.
        python: what runs ``.py`` files, and the agent on other machines.
        port: the first of those to use between machines.
        variables: environment variables for all ranks.
    """

    command: Sequence[str]
    hosts: Sequence[Host]
    backend: str = "ring"
    max_restarts: int = 0
    min_ranks: int | None = None
    grace: float = 5.0
    shell: str = SSH
    python: str = sys.executable
    port: int = STARTING_PORT
    variables: Mapping[str, str] = field(default_factory=dict)
    output: str = "prefixed"
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        natural("max_restarts", self.max_restarts)
        number("grace", self.grace, least=0)
        if self.backend not in BACKENDS:
            raise ConfigurationError(f"backend={self.backend!r}; expected one of {BACKENDS}.")
        if self.output not in STYLES:
            raise ConfigurationError(f"output={self.output!r}; expected one of {STYLES}.")
        if not self.command or not self.hosts:
            raise ConfigurationError("There is no command to run. Give one after --.")
        if natural("min_ranks", self.least_ranks, least=1) > len(self.hosts):
            raise ConfigurationError(
                f"min_ranks={self.min_ranks} with {len(self.hosts)} ranks; expected no more."
            )
        if self.backend == "mpi" and self.least_ranks < len(self.hosts):
            raise ConfigurationError(
                "mpirun does not tell which machine is gone, so min_ranks has to be the number of "
                "ranks with backend='mpi'. Use the ring."
            )
        last = self.port + len(self.hosts)
        if natural("port", self.port, least=1) > 65535 or last > 65535:
            raise ConfigurationError(
                f"port={self.port}; the last one would be {last}, expected no more than 65535."
            )
        if own := sorted(OF_A_RUN & self.variables.keys()):
            raise ConfigurationError(
                f"{own[0]}={self.variables[own[0]]} is given to all ranks, and tells them who and "
                "where they are: the launcher sets it. Leave it out."
            )
        self._check_programs()

    def _check_programs(self) -> None:
        """Raise for what is not there to be run, before anything is."""
        script = self.command[0]
        if any(host.is_here for host in self.hosts):
            if script.endswith(".py") and not Path(script).is_file():
                raise ConfigurationError(f"there is no file {script}.")
            if self.backend != "mpi":  # mpirun finds programs its own way
                self._check_program(self.line[0], self.variables.get("PATH"))
        if not all(host.is_here for host in self.hosts):
            try:
                shell = shlex.split(self.shell)
            except ValueError as error:
                raise ConfigurationError(f"shell={self.shell!r} is no command: {error}.") from error
            self._check_program(shell[0] if shell else "", None)

    @staticmethod
    def _check_program(program: str, path: str | None) -> None:
        if shutil.which(program, path=path) is None:
            raise ConfigurationError(
                f"cannot run {program!r}: expected a program on the PATH, the path of a file that "
                "may be executed, or a .py file."
            )

    @property
    def least_ranks(self) -> int:
        """With how few ranks it may go on."""
        return len(self.hosts) if self.min_ranks is None else self.min_ranks

    @property
    def line(self) -> list[str]:
        """What each rank runs."""
        is_script = self.command[0].endswith(".py")
        return [*([self.python] if is_script else []), *self.command]


def launch(job: Job) -> int:
    """Run a job to its end; returns its exit code.

    0: all ranks ended well. 75: one was lost, and no restart is left. 143: preempted by SIGTERM.
    Else the code of the rank that failed first. Signals to this process are passed on.

    Raises:
        ConfigurationError: a command cannot be run, or a host lacks what the backend needs.
    """
    output = Output(job.output, job.log_dir, 1 if job.backend == "mpi" else len(job.hosts))
    hosts = list(job.hosts)
    try:
        with _Signals() as signals:
            for attempt in range(job.max_restarts + 1):
                variables = {**job.variables, RESTART: str(attempt), TOKEN: secrets.token_hex(16)}
                ranks = _Attempt(job, hosts, variables, output, signals).run()
                outcome = outcome_of(ranks, signals.asked)
                hosts = _left(hosts, ranks)
                if not outcome.may_restart or attempt == job.max_restarts:
                    break
                if len(hosts) < job.least_ranks:
                    output.say(f"only {_ranks(len(hosts))} left; {job.least_ranks} needed.")
                    break
                output.say(
                    f"{outcome.reason}; starting again with {_ranks(len(hosts))} "
                    f"(restart {attempt + 1} of {job.max_restarts})."
                )
                output.forget()
        _report(outcome, ranks, output)
        return outcome.code
    finally:
        output.close()


def _left(hosts: Sequence[Host], ranks: Sequence[RankProcess]) -> list[Host]:
    gone = {rank.host for rank in ranks if rank.is_host_gone}
    return [host for host in hosts if host.name not in gone]


def _report(outcome: Outcome, ranks: Sequence[RankProcess], output: Output) -> None:
    """The last word: why it ended, and the traceback of the rank that did it."""
    if not outcome.reason:
        return
    output.say(f"{outcome.reason}.")
    if outcome.code in (PREEMPTED,) or outcome.may_restart:
        return
    tracebacks = {r.rank: output.traceback_of(r.rank) for r in ranks if r.code and not r.was_told}
    # A rank that only tells of another one's exception is not where to look.
    culprits = [r for r, lines in tracebacks.items() if lines and not _is_echo(lines)]
    rank = outcome.rank if outcome.rank in culprits or not culprits else culprits[0]
    if rank is not None and (lines := tracebacks.get(rank)):
        output.say(f"the last of rank {rank}:\n" + "\n".join(lines))


def _is_echo(lines: Sequence[str]) -> bool:
    return any(line.startswith("mlx_fit.errors.Peer") for line in lines)


class _Signals:
    """SIGTERM, SIGINT and SIGHUP to this process, and a file that is readable when one came."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.count = 0
        self.reader, self._writer = socket.socketpair()
        self._before: dict[signal.Signals, object] = {}
        self._tap = -1

    def __enter__(self) -> _Signals:
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._tap = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(name) != signal.SIG_IGN:  # as under nohup
                self._before[name] = signal.signal(name, self._note)
        # Python shows a signal only if it has a handler: an ended rank should wake us at once.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._tap)
        self.reader.close()
        self._writer.close()

    def clear(self) -> None:
        """Take note that it was read."""
        with contextlib.suppress(BlockingIOError):
            while self.reader.recv(4096):
                pass

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_interrupt = number == signal.SIGINT
        self.asked = signal.SIGINT if is_interrupt else signal.SIGTERM
        self.count += 1


class _Attempt:
    """One life of all ranks."""

    def __init__(
        self,
        job: Job,
        hosts: Sequence[Host],
        variables: Mapping[str, str],
        output: Output,
        signals: _Signals,
    ) -> None:
        self._job = job
        self._hosts = hosts
        self._variables = variables
        self._output = output
        self._signals = signals
        self._ranks: list[RankProcess] = []
        self._selector = selectors.DefaultSelector()
        self._heeded = 0
        self._deadline: float | None = None  # of what is done next: SIGTERM, SIGKILL, giving up
        self._level = 0

    def run(self) -> list[RankProcess]:
        """Start them and see them to their end."""
        self._selector.register(self._signals.reader, selectors.EVENT_READ)
        with _files() as folder:
            try:
                self._start(folder)
                while self._running():
                    self._turn()
                self._turn()
            finally:
                self._end_all()
        return self._ranks

    def _running(self) -> list[RankProcess]:
        return [rank for rank in self._ranks if rank.poll()]

    def _start(self, folder: Path) -> None:
        job = self._job
        if job.backend == "mpi":
            self._add(start_mpi(job.line, self._hosts, self._variables, job.shell))
            return
        around = surroundings(job.backend, self._hosts, job.port)
        threads = _threads(self._hosts, job.variables)
        for rank, (host, its) in enumerate(zip(self._hosts, around, strict=True)):
            if host.is_here:
                _write_files(folder / str(rank), its)
                variables = {**threads, **self._variables}
                self._add(start_here(rank, job.line, variables, its))
            else:
                arguments = (job.shell, job.python, job.line, self._variables, its)
                self._add(start_there(rank, host.name, *arguments))

    def _add(self, rank: RankProcess) -> None:
        self._ranks.append(rank)
        for stream, pipe in enumerate(rank.pipes, 1):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, (rank.rank, stream))

    def _turn(self) -> None:
        """Pass output on, heed signals and failures."""
        for key, _ in self._selector.select(0.2):
            if key.data is None:
                self._signals.clear()
            else:
                self._read(key)
        self._heed_signals()
        self._heed_failures()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._escalate()

    def _read(self, key: selectors.SelectorKey) -> None:
        rank, stream = key.data
        try:
            data = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return
        if data:
            self._output.add(rank, stream, data)
        else:
            self._selector.unregister(key.fileobj)

    def _heed_signals(self) -> None:
        """The first is passed on; SIGINT, whose sender waits, without a limit. A second presses."""
        count, asked = self._signals.count, self._signals.asked
        if asked is None or count == self._heeded:
            return
        first, self._heeded = not self._heeded, count
        if first and asked == signal.SIGINT:
            self._tell(signal.SIGINT)
        else:
            self._escalate()

    def _heed_failures(self) -> None:
        """One that failed ends all: the others have a moment to end by themselves."""
        codes = [rank.code for rank in self._ranks if rank.code]
        if codes and self._deadline is None and self._level == 0:
            is_saving = all(code == PREEMPTED for code in codes)
            self._deadline = time.monotonic() + (_SAVE_SECONDS if is_saving else _END_SECONDS)

    def _escalate(self) -> None:
        """SIGTERM, then SIGKILL, then without those that do not answer."""
        self._level += 1
        if self._level == 1:
            self._tell(signal.SIGTERM)
            self._deadline = time.monotonic() + self._job.grace
        elif self._level == 2:
            self._tell(signal.SIGKILL)
            self._deadline = time.monotonic() + _ANSWER_SECONDS
        else:
            self._deadline = None
            for rank in self._ranks:
                if isinstance(rank, RemoteRank):
                    rank.give_up()

    def _tell(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            rank.tell(number)

    def _end_all(self) -> None:
        """Whatever happened: no rank is left, and all that they printed is shown."""
        self._tell(signal.SIGKILL)
        until = time.monotonic() + _ANSWER_SECONDS
        while self._running() and time.monotonic() < until:
            time.sleep(0.02)
        for rank in self._ranks:
            if isinstance(rank, RemoteRank):
                rank.give_up()
            while rank.poll():
                time.sleep(0.02)
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._drain(key)
        for rank in self._ranks:
            self._output.finish(rank.rank)
            for pipe in rank.pipes:
                pipe.close()
        self._selector.close()

    def _drain(self, key: selectors.SelectorKey) -> None:
        rank, stream = key.data
        with contextlib.suppress(BlockingIOError):
            while data := os.read(key.fd, 1 << 16):
                self._output.add(rank, stream, data)


@contextlib.contextmanager
def _files() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mlx_fit_launch_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(folder: Path, its: Surroundings) -> None:
    folder.mkdir()
    for name, text in its.files.items():
        path = folder / f"{name.lower()}.json"
        path.write_text(text)
        its.variables[name] = str(path)


def _threads(hosts: Sequence[Host], given: Mapping[str, str]) -> dict[str, str]:
    """Ranks of one machine share its cores: each BLAS would take all of them."""
    num_here = sum(host.is_here for host in hosts)
    share = str(max(1, (os.cpu_count() or 1) // max(1, num_here)))
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    taken = {*os.environ, *given}
    defaults = {} if num_here == 1 or taken & set(names) else dict.fromkeys(names, share)
    return defaults if "PYTHONUNBUFFERED" in taken else {**defaults, "PYTHONUNBUFFERED": "1"}


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"
