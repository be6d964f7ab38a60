"""Fine-tune a language model: LoRA, DoRA, QLoRA, its last layers, or all of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_fit.cli.fine_tuning import FineTuning, check_new
from mlx_fit.cli.finetune_settings import SETTINGS, read_settings
from mlx_fit.cli.settings import add_flags, checking_usage

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit finetune``."""
    parser.epilog = (
        "Every option is also a key of a TOML file for --config, with dashes or underscores; "
        "options of the command line win. A .yaml file is read as mlx_lm.lora reads it."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings: .toml, or .yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print statistics, plan and a batch, train nothing"
    )
    add_flags(parser, SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code."""
    with checking_usage():
        settings = read_settings(arguments)
    if not arguments.dry_run:
        check_new(settings)
    with FineTuning(settings) as task:
        task.print_plan()
        if arguments.dry_run:
            task.print_batch()
            return 0
        history = task.train()
    return INTERRUPTED if history.stopped_by == "SIGINT" else 0
