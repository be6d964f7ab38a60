"""What does watching cost? ``fit`` with each callback, and with all, against the bare loop by hand.

Network, data and loop are those of ``benchmarks/fit.py``. A round is an epoch of both, in turn, in
one process; the time of ``fit``'s contains what the callbacks do at its end. Also printed: calls of
mlx_fit's own functions in a steady batch (the median and the most of 100).
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fit import STEPS, EpochClock, by_hand, make_model

import mlx_fit
from mlx_fit import (
    EMA,
    Callback,
    CSVLogger,
    DeviceMonitor,
    EarlyStopping,
    GradientMonitor,
    JSONLogger,
    LoggerCallback,
    ModelCheckpoint,
    Profiler,
    TensorBoard,
    Timer,
    Trainer,
)

ROUNDS = int(os.environ.get("ROUNDS", "9"))
WIDTH, BATCH_SIZE = 512, 256
ROOT = str(Path(mlx_fit.__file__).parent)


class Nowhere:
    """A logger that keeps nothing: what is measured is the callback."""

    def log_config(self, config: object) -> None:
        pass

    def log_scalars(self, values: object, step: int) -> None:
        pass

    def close(self, error: BaseException | None = None) -> None:
        pass


class Alternate(Callback):
    """Runs the hand-written loop before each epoch, so that both see the same machine."""

    def __init__(self, hand: Callable[[], float], seconds: list[float]) -> None:
        self._hand = hand
        self._seconds = seconds

    def on_epoch_begin(self, epoch: int, logs: object) -> None:
        self._seconds.append(self._hand())


class CountCalls(Callback):
    """Counts calls of the package's functions between the ends of batches."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts
        self._count = 0

    def on_train_batch_end(self, batch: int, logs: object) -> None:
        sys.setprofile(None)
        if batch > 50:
            self._counts.append(self._count)
        self._count = 0
        if 50 <= batch < 150:
            sys.setprofile(self._note)

    def _note(self, frame: object, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):  # type: ignore[attr-defined]
            self._count += 1


def watchers(folder: Path) -> dict[str, list[Callback]]:
    """What is measured."""
    rows: dict[str, list[Callback]] = {
        "none, verbose=0": [],
        "the bar": [],
        "TensorBoard": [TensorBoard(folder / "board")],
        "TensorBoard, every 10 batches": [TensorBoard(folder / "often", update_freq=10)],
        "CSVLogger, JSONLogger": [CSVLogger(folder / "a.csv"), JSONLogger(folder / "a.jsonl")],
        "LoggerCallback, every 10 steps": [LoggerCallback(Nowhere(), 10)],
        "EarlyStopping, Timer": [EarlyStopping("loss", patience=99), Timer("9 hours")],
        "ModelCheckpoint, best weights": [
            ModelCheckpoint(folder / "best.safetensors", "loss", save_best_only=True)
        ],
        "DeviceMonitor": [DeviceMonitor()],
        "GradientMonitor": [GradientMonitor()],
        "Profiler": [Profiler(prints=False)],
        "EMA": [EMA(0.999)],
    }
    names = ("TensorBoard", "CSVLogger, JSONLogger", "EarlyStopping, Timer", "DeviceMonitor")
    quiet = [*names, "ModelCheckpoint, best weights", "LoggerCallback, every 10 steps"]
    rows["all that only look"] = [callback for name in quiet for callback in rows[name]]
    more = ("GradientMonitor", "Profiler", "EMA")
    rows["all of them"] = [c for name in (*quiet, *more) for c in rows[name]]
    return rows


def measure(name: str, callbacks: list[Callback], x: np.ndarray, y: np.ndarray) -> None:
    hand = by_hand(WIDTH, x, y, BATCH_SIZE)
    hand()
    bare: list[float] = []
    fits: list[float] = []
    counts: list[int] = []

    def fit(epochs: int, first: Callback, last: list[Callback]) -> None:
        model, optimizer = make_model(WIDTH)
        trainer = Trainer(model, optimizer, "cross_entropy", ["accuracy"], batch_size=BATCH_SIZE)
        verbose = 0 if name.endswith("verbose=0") else 1
        with contextlib.redirect_stdout(io.StringIO()):
            order = [first, *callbacks, *last]
            trainer.fit((x, y), epochs=epochs, callbacks=order, verbose=verbose)

    fit(ROUNDS + 1, Alternate(hand, bare), [EpochClock(fits)])
    fit(1, CountCalls(counts), [])
    sys.setprofile(None)
    ratios = [f / b for f, b in zip(fits[1:], bare[1:], strict=True)]
    over_us = 1e6 * (statistics.median(fits[1:]) - statistics.median(bare[1:])) / STEPS
    print(
        f"{name:<32} {statistics.median(ratios):>6.3f} {min(ratios):>7.3f}-{max(ratios):.3f} "
        f"{over_us:>9.0f} {statistics.median(counts):>6.0f} {max(counts):>6}",
        flush=True,
    )


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH_SIZE, 256)).astype(np.float32)
    y = rng.integers(0, 10, len(x))
    print(f"fit / hand-written loop, width {WIDTH}, batch {BATCH_SIZE}, {ROUNDS} rounds")
    print(
        f"{'watched by':<32} {'ratio':>6} {'spread':>13} {'over, us':>11} {'calls':>6} {'most':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, callbacks in watchers(Path(folder)).items():
            measure(name, callbacks, x, y)


if __name__ == "__main__":
    main()
