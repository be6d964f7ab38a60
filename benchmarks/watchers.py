"""What does watching cost? ``fit`` with each callback, and with all, against the bare loop by hand.

Network, data, loop and method are those of ``benchmarks/fit.py``: an epoch of ``fit``, with what
the callbacks do at its end, against the mean of the two by hand around it, by the clock and in
processor time. Also printed: calls of mlx_fit's own functions in a steady batch (the median and the
most of 100).
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from fit import HEAD, STEPS, row

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
)
from mlx_fit.cli.bench_fit import against_hand, calls_of_batches

ROUNDS = int(os.environ.get("ROUNDS", "15"))
WIDTH, BATCH_SIZE = int(os.environ.get("WIDTH", "512")), int(os.environ.get("BATCH", "256"))


class Nowhere:
    """A logger that keeps nothing: what is measured is the callback."""

    def log_config(self, config: object) -> None:
        pass

    def log_scalars(self, values: object, step: int) -> None:
        pass

    def close(self, error: BaseException | None = None) -> None:
        pass


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
        "GradientMonitor(every=10)": [GradientMonitor(every=10)],
        "Profiler": [Profiler(prints=False)],
        "EMA": [EMA(0.999)],
    }
    names = ("TensorBoard", "CSVLogger, JSONLogger", "EarlyStopping, Timer", "DeviceMonitor")
    quiet = [*names, "ModelCheckpoint, best weights", "LoggerCallback, every 10 steps"]
    rows["all that only look"] = [callback for name in quiet for callback in rows[name]]
    more = ("GradientMonitor", "Profiler", "EMA")
    rows["all of them"] = [c for name in (*quiet, *more) for c in rows[name]]
    fewer = ("GradientMonitor(every=10)", "Profiler", "EMA")
    rows["all of them, norms every 10"] = [c for name in (*quiet, *fewer) for c in rows[name]]
    return rows


def main() -> None:
    print(
        f"fit / hand-written loop, width {WIDTH}, batch {BATCH_SIZE}, {STEPS} steps an epoch, "
        f"{ROUNDS} rounds"
    )
    print(f"{'watched by':<32}   {HEAD}  calls   most")
    with tempfile.TemporaryDirectory() as folder:
        for name, callbacks in watchers(Path(folder)).items():
            verbose = 0 if name.endswith("verbose=0") else 1
            found = against_hand(WIDTH, BATCH_SIZE, STEPS, ROUNDS, callbacks, verbose)
            counts = calls_of_batches(WIDTH, BATCH_SIZE, callbacks, verbose)
            print(
                f"{name:<32} {row(found)} {statistics.median(counts):>6.0f} {max(counts):>6}",
                flush=True,
            )


if __name__ == "__main__":
    main()
