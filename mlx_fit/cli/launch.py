"""Start a program on several processes or machines, watch over it, and start it again."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mlx_fit.distributed.backends import BACKENDS, STARTING_PORT
from mlx_fit.distributed.hosts import Host, read_hosts, seat
from mlx_fit.distributed.launch import SSH, Job, launch
from mlx_fit.distributed.output import STYLES
from mlx_fit.errors import ConfigurationError

SSH_VARIABLE = "MLX_FIT_SSH"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit launch``."""
    parser.usage = "mlx-fit launch [-n N] [options] -- COMMAND ..."
    parser.epilog = (
        "Exit codes: 0 all ranks ended well, 1 (or its own) a rank's program failed, 2 wrong "
        "usage, 75 a rank or machine was lost and no restart is left, 143 preempted by SIGTERM."
    )
    add = parser.add_argument
    add("-n", "--num-ranks", type=int, metavar="N", help="ranks in all (default: one a host)")
    add("--hosts", metavar="FILE|A,B,C", help="machines; default this one")
    add("--backend", choices=BACKENDS, default="ring")
    add(
        "--max-restarts", type=int, default=0, metavar="K", help="restarts after a loss (default 0)"
    )
    add("--min-ranks", type=int, metavar="M", help="go on with as few if machines are gone")
    add("--log-dir", metavar="DIR", help="also write each rank's output to DIR")
    add("--output", choices=STYLES, default="prefixed", help="what the terminal shows")
    add("--grace", type=float, default=5.0, metavar="S", help="seconds from SIGTERM to SIGKILL")
    add("--env", action="append", default=[], metavar="K=V", help="a variable for all ranks")
    add("--python", default=sys.executable, help="runs .py files, and starts remote ranks")
    add("--ssh", metavar="COMMAND", help=f"the remote shell (default ${SSH_VARIABLE}, or ssh)")
    add("--port", type=int, default=STARTING_PORT, help="the first one to use between machines")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="program, or a .py file")


def run(arguments: argparse.Namespace) -> int:
    """Launch; the exit code of the run, or 2 if it cannot even start."""
    try:
        return launch(_job(arguments))
    except ConfigurationError as error:
        if arguments.debug:
            raise
        print(f"mlx-fit launch: {error}", file=sys.stderr)
        return 2


def _job(arguments: argparse.Namespace) -> Job:
    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    if arguments.num_ranks is not None and arguments.num_ranks < 1:
        raise ConfigurationError(f"-n {arguments.num_ranks}; expected at least 1.")
    if arguments.log_dir == "":
        raise ConfigurationError("--log-dir is empty; expected a folder.")
    hosts = [Host("localhost")] if arguments.hosts is None else read_hosts(arguments.hosts)
    return Job(
        command=command,
        hosts=seat(hosts, arguments.num_ranks),
        backend=arguments.backend,
        max_restarts=arguments.max_restarts,
        min_ranks=arguments.min_ranks,
        grace=arguments.grace,
        shell=arguments.ssh or os.environ.get(SSH_VARIABLE) or SSH,
        python=arguments.python,
        port=arguments.port,
        variables=_variables(arguments.env),
        output=arguments.output,
        log_dir=None if arguments.log_dir is None else Path(arguments.log_dir),
    )


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError(f"--env {text}; expected NAME=VALUE.")
        variables[name] = value
    return variables
