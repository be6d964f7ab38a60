"""What does ``fit`` cost over a hand-written compiled MLX loop?

Both train the same network on the same NumPy data, in turn, in one process. The hand-written loop
does what a user would: slice, convert, one compiled step, one ``mx.eval``. ``fit`` has shuffling, a
metric, a bar and TensorBoard on. An epoch of ``fit`` is compared with the mean of the two by hand
that stand around it, so that a machine that grows slower counts on both sides. Also printed: a
second hand-written loop against the first in the same way, which is the noise.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import mlx_fit  # first: it may have to load a BLAS before mlx.core
from mlx_fit import TensorBoard, Trainer

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip

ROUNDS = int(os.environ.get("ROUNDS", "25"))
STEPS = 100


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(256, width)
        self.head = nn.Linear(width, 10)

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(nn.relu(self.hidden(x)))


def make_model(width: int) -> tuple[MLP, optim.AdamW]:
    mx.random.seed(0)
    model, optimizer = MLP(width), optim.AdamW(1e-3)
    mx.eval(model.parameters())
    return model, optimizer


def by_hand(width: int, x: np.ndarray, y: np.ndarray, batch_size: int) -> Callable[[], float]:
    """A function that trains an epoch with a hand-written loop and returns its seconds."""
    model, optimizer = make_model(width)
    optimizer.init(model.trainable_parameters())

    def loss_function(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x), y).mean()

    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_function)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    rng = np.random.default_rng(0)

    def batches() -> Iterator[tuple[mx.array, mx.array]]:
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            yield mx.array(x[rows]), mx.array(y[rows])

    def epoch() -> float:
        start = time.perf_counter()
        for a, b in batches():
            loss = step(a, b)
            mx.eval(state, loss)
        return time.perf_counter() - start

    return epoch


class EpochClock(mlx_fit.Callback):
    """Times epochs from inside, so that compilation of the first stays out."""

    def __init__(self, rounds: list[float]) -> None:
        self.rounds = rounds

    def on_epoch_begin(self, epoch: int, logs: object) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: object) -> None:
        self.rounds.append(time.perf_counter() - self.start)


def compare(width: int, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * batch_size, 256)).astype(np.float32)
    y = rng.integers(0, 10, len(x))
    hand, again = by_hand(width, x, y, batch_size), by_hand(width, x, y, batch_size)
    model, optimizer = make_model(width)
    trainer = Trainer(model, optimizer, "cross_entropy", ["accuracy"], batch_size=batch_size)
    hand(), again()
    fits: list[float] = []
    bare: list[float] = []  # after an epoch of fit, and before the next
    twice: list[float] = []

    class Alternate(mlx_fit.Callback):
        """Runs the hand-written loops between epochs, so that all see the same machine."""

        def on_epoch_end(self, epoch: int, logs: object) -> None:
            bare.append(hand())
            twice.append(again())
            bare.append(hand())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        callbacks = [EpochClock(fits), TensorBoard(folder), Alternate()]
        trainer.fit((x, y), epochs=ROUNDS + 1, callbacks=callbacks, verbose=1)
    around = [(bare[2 * i - 1] + bare[2 * i]) / 2 for i in range(1, ROUNDS + 1)]
    ratios = [f / b for f, b in zip(fits[1:], around, strict=True)]
    beside = [(bare[2 * i] + bare[2 * i + 1]) / 2 for i in range(1, ROUNDS + 1)]
    noise = [t / b for t, b in zip(twice[1:], beside, strict=True)]
    per_step_ms = 1e3 * statistics.median(bare[1:]) / STEPS
    over_us = 1e6 * (statistics.median(fits[1:]) - statistics.median(bare[1:])) / STEPS
    print(
        f"{width:>6} {batch_size:>6} {per_step_ms:>8.2f} {summary(ratios)} {over_us:>8.0f} "
        f"{summary(noise)}"
    )


def summary(ratios: list[float]) -> str:
    """Median, the 95 % interval of the median (by ranks, as for the sign test), and all."""
    ordered = sorted(ratios)
    half = round(0.98 * len(ordered) ** 0.5)
    low = ordered[max(len(ordered) // 2 - half, 0)]
    high = ordered[min((len(ordered) - 1) // 2 + half, len(ordered) - 1)]
    median = statistics.median(ordered)
    return f"{median:>7.3f} {low:.3f}-{high:.3f} {ordered[0]:.3f}-{ordered[-1]:.3f}"


def main() -> None:
    print(
        f"fit / hand-written loop, {STEPS} steps an epoch, {ROUNDS} rounds, {mx.default_device()}"
    )
    columns = "  95% interval         all"
    print(f" width  batch  step_ms   ratio{columns}  over_us   noise{columns}")
    for width, batch_size in ((64, 32), (512, 64), (512, 256), (1024, 256)):
        compare(width, batch_size)


if __name__ == "__main__":
    main()
