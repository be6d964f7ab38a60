"""The ``mlx-fit`` command: one module per verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlx_fit._version import __version__
from mlx_fit.cli import (
    bench,
    demo,
    doctor,
    evaluate,
    finetune,
    fuse,
    generate,
    inspect,
    launch,
    report,
    train,
)
from mlx_fit.cli.settings import UsageError, nearest
from mlx_fit.errors import DistributedError, MlxFitError, Preempted

VERBS = {
    "bench": bench,
    "demo": demo,
    "doctor": doctor,
    "evaluate": evaluate,
    "finetune": finetune,
    "fuse": fuse,
    "generate": generate,
    "inspect": inspect,
    "launch": launch,
    "report": report,
    "train": train,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 is success, 1 a failed run (one readable line; the traceback with ``--debug``), 2 wrong usage,
    143 a run ended by SIGTERM.
    """
    parser, verbs = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        verb = verbs[arguments.verb]
        flags = [flag for action in verb._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        verb.error(f"unrecognized arguments: {' '.join(unknown)}.{nearest(word, flags)}")
    try:
        return VERBS[arguments.verb].run(arguments)
    except Preempted as error:
        print(f"mlx-fit: {error}", file=sys.stderr)
        return 143
    except (MlxFitError, OSError) as error:
        if arguments.debug:
            raise
        print(f"mlx-fit {arguments.verb}: {error}", file=sys.stderr)
        if isinstance(error, UsageError):
            return 2
        return error.exit_code if isinstance(error, DistributedError) else 1


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each verb."""
    parser = argparse.ArgumentParser(prog="mlx-fit", description="Training for MLX.")
    parser.add_argument("--version", action="version", version=f"mlx-fit {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        # Abbreviations would turn a misspelt flag into another one.
        verb = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(verb)
    return parser, verbs.choices
