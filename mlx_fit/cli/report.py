"""Write a page of HTML with the curves, metrics and arguments of runs.

It is one file without scripts, which loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_fit.cli.report_page import page
from mlx_fit.cli.report_runs import name_runs, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlx-fit report``."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="a checkpoint, a folder of them, or a file of CSVLogger or JSONLogger",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the page (default: report.html); - prints it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the runs and write the page."""
    runs = [read_run(path) for path in arguments.runs]
    name_runs(runs)
    content = page(runs).encode("utf-8", errors="replace")  # names of files may be no UTF-8
    if str(arguments.output) == "-":
        sys.stdout.write(content.decode())
        return 0
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(content)
    print(f"{arguments.output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0
