"""Train a small network on handwritten digits, the quickest look at everything."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit import datasets
from mlx_fit.callbacks.csv_logger import CSVLogger
from mlx_fit.callbacks.early_stopping import EarlyStopping
from mlx_fit.callbacks.model_checkpoint import ModelCheckpoint
from mlx_fit.callbacks.tensorboard import TensorBoard
from mlx_fit.cli.results import print_table
from mlx_fit.history import History
from mlx_fit.trainer import Trainer


class DigitNet(nn.Module):
    """Two convolutions and a classifier for 8 x 8 images: ``(batch, 8, 8)`` to ``(batch, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(4 * 4 * 32, 10)

    def __call__(self, x: mx.array) -> mx.array:
        """Logits of a batch of images."""
        x = nn.relu(self.conv1(x[..., None]))
        x = nn.relu(self.conv2(x))
        return self.head(self.dropout(x.reshape(x.shape[0], -1)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit demo``."""
    parser.add_argument("--epochs", type=_positive, default=30, help="at most so many (default 30)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where files go")
    parser.add_argument("--seed", type=int, default=0)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} epochs; expected at least 1")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Train, then print a table of what came of it."""
    out: Path = arguments.out
    images, labels = datasets.digits()
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = order[:1437], order[1437:]  # a fifth is kept for validation
    mx.random.seed(arguments.seed)
    trainer = Trainer(
        DigitNet(),
        optim.AdamW(learning_rate=2e-3),
        loss="cross_entropy",
        metrics=["accuracy"],
        batch_size=64,
        seed=arguments.seed,
    )
    start = time.perf_counter()
    history = trainer.fit(
        (images[train], labels[train]),
        (images[held_out], labels[held_out]),
        epochs=arguments.epochs,
        callbacks=[
            ModelCheckpoint(out / "best.safetensors", monitor="val_accuracy", save_best_only=True),
            EarlyStopping(monitor="val_loss", patience=4, restore_best_weights=True),
            TensorBoard(out / "tensorboard"),
            CSVLogger(out / "history.csv"),
        ],
    )
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate((images[held_out], labels[held_out]), verbose=0)
    _print_result(out, history, metrics, seconds)
    return 0


def _print_result(out: Path, history: History, metrics: dict[str, float], seconds: float) -> None:
    epoch, accuracy = history.best("val_accuracy")
    reached = f"{metrics['accuracy']:.4f} (best: {accuracy:.4f}, epoch {epoch + 1})"
    rows = [
        ("held-out accuracy", reached),
        ("time", f"{seconds:.1f} s for {len(history.epoch)} epochs"),
        ("best weights", str(out / "best.safetensors")),
        ("curves", str(out / "history.csv")),
        ("TensorBoard files", str(out / "tensorboard")),
    ]
    print_table("Handwritten digits", rows)
    print(f"Next: read what just ran in {__file__},")
    print("see your machine with")
    print("  mlx-fit doctor")
    print("and the curves with")
    print(f"  pip install tensorboard && tensorboard --logdir {out / 'tensorboard'}")
