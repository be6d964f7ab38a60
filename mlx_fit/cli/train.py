"""Train what a TOML file describes: model, optimizer, loss, data and callbacks."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_fit.cli.train_config import read_config
from mlx_fit.cli.train_run import TrainRun

INTERRUPTED = 130
EXAMPLE = """\
example: digits.toml, trained by  mlx-fit train digits.toml --set fit.epochs=3

  loss = "cross_entropy"
  metrics = ["accuracy"]

  [model]
  use = "net.py:Net"          # a file beside this one, or package.module:Net
  hidden = 64                 # its arguments

  [optimizer]
  use = "AdamW"
  learning_rate = { use = "warmup_cosine", peak = 2e-3, total_steps = 200, warmup_steps = 20 }

  [data]
  train = "digits"            # or "train.csv", "train.npz", "data.py:function"

  [fit]                       # arguments of Trainer and of fit
  epochs = 10
  batch_size = 64
  validation_split = 0.2
  checkpoint_dir = "runs/digits"
  resume = "auto"

  [callbacks.EarlyStopping]
  patience = 3

exit codes: 0, 1 for a run that failed, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM.
docs/command-line.md says more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit train``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to train, and how")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change or add a key, such as fit.epochs=3 or callbacks.EarlyStopping=false; KEY= "
        "leaves it out; may be given several times",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the layers, a plan of memory and the shapes of a batch, train nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code."""
    task = TrainRun(read_config(arguments.config, arguments.set), arguments.config)
    if arguments.dry_run:
        task.show()
        return 0
    history = task.train()
    return INTERRUPTED if history.stopped_by == "SIGINT" else 0
