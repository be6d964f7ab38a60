"""Measure on this machine what training costs: fit, BLAS, data, checkpoints."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit._version import __version__
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.checks import file_of
from mlx_fit.cli.bench_fit import against_hand, calls_of_batches, interval
from mlx_fit.cli.doctor import speeds
from mlx_fit.cli.results import print_table
from mlx_fit.cli.settings import checking_usage
from mlx_fit.data.dataset import ArrayDataset
from mlx_fit.data.loader import DataLoader
from mlx_fit.runtime.memory import format_bytes
from mlx_fit.trainer import Trainer

MIB = 2**20
NOISY = 0.1  # width of the interval from which on a ratio says little


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        fits: width and batch of each network that is trained.
        steps, rounds: of an epoch, and epochs of each loop at most.
        seconds: that a comparison may take.
        num_rows: of the loader's data.
        side: of the square layers that are saved.
        repeats: of saves, loads and passes over data.
    """

    fits: tuple[tuple[int, int], ...] = ((512, 64), (512, 256))
    steps: int = 100
    rounds: int = 15
    seconds: float = 12.0
    num_rows: int = 60_000
    side: int = 1024
    repeats: int = 5


QUICK = Sizes(fits=((64, 32),), steps=20, rounds=3, num_rows=2_000, side=64, repeats=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit bench``."""
    parser.epilog = (
        "Ratios are medians of epochs run in turn, with the 95 % interval of the median; other "
        "work on the machine widens it, and 'noise' shows by how much two equal loops differ."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured")
    parser.add_argument("--quick", action="store_true", help="a few seconds, and rough")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    with checking_usage():
        if arguments.json is not None:
            file_of("--json", arguments.json)
    sizes = QUICK if arguments.quick else Sizes()
    found = measure(sizes)
    print_table(f"mlx_fit {__version__}, mlx {found['machine']['mlx']}", _rows(found))
    if any(fit["noise"]["high"] - fit["noise"]["low"] > NOISY for fit in found["fit"]):
        print(
            "Two equal loops differ as much as the line of noise says: other work runs here, or "
            "threads wait for each other. OPENBLAS_NUM_THREADS=1 moves less."
        )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(sizes: Sizes) -> dict[str, Any]:
    """Everything, as plain values; random keys of MLX are drawn."""
    machine = {
        "mlx_fit": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": mx.default_device().type.name,
    }
    return {
        "machine": machine,
        "fit": [measure_fit(width, size, sizes) for width, size in sizes.fits],
        "product": speeds(),
        "loader": measure_loader(sizes),
        "checkpoint": measure_checkpoint(sizes),
    }


def measure_fit(width: int, batch_size: int, sizes: Sizes) -> dict[str, Any]:
    """``fit``, with a metric and a bar, against a compiled loop by hand."""
    found = against_hand(width, batch_size, sizes.steps, sizes.rounds, seconds=sizes.seconds)
    return {
        "width": width,
        "batch_size": batch_size,
        "step_ms": found.step_ms,
        "over_us": found.over_us,
        "ratio": dict(zip(("median", "low", "high"), interval(found.ratios), strict=True)),
        "noise": dict(zip(("median", "low", "high"), interval(found.noise), strict=True)),
        "calls_per_batch": statistics.median(calls_of_batches(width, batch_size)),
    }


def measure_loader(sizes: Sizes) -> dict[str, float]:
    """Shuffled batches of 64 images of 28 x 28 bytes, against NumPy's own indexing."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (sizes.num_rows, 28, 28), np.uint8)
    y = rng.integers(0, 10, sizes.num_rows)
    loader = DataLoader(ArrayDataset((x, y)), batch_size=64, shuffle=True, seed=0)

    def bare() -> None:
        order = rng.permutation(len(x))
        for start in range(0, len(x), 64):
            rows = order[start : start + 64]
            _ = x[rows], y[rows]

    seconds: dict[str, list[float]] = {"loader": [], "bare": []}
    for _ in range(sizes.repeats):
        seconds["loader"].append(_seconds(lambda: sum(1 for _ in loader)))
        seconds["bare"].append(_seconds(bare))
    ours, theirs = (statistics.median(seconds[name]) for name in ("loader", "bare"))
    return {
        "rows_per_second": sizes.num_rows / ours,
        "numpy_rows_per_second": sizes.num_rows / theirs,
    }


def measure_checkpoint(sizes: Sizes) -> dict[str, float]:
    """A whole checkpoint, with hashes: written and waited for, in the background, and read."""
    model = nn.Sequential(*[nn.Linear(sizes.side, sizes.side) for _ in range(4)])
    trainer = Trainer(model, optim.AdamW(1e-3), "mse", batch_size=8)
    rows = np.ones((8, sizes.side), np.float32), np.ones((8, sizes.side), np.float32)
    found: dict[str, list[float]] = {"save": [], "load": []}
    with tempfile.TemporaryDirectory() as folder:
        policy = CheckpointPolicy("1 steps", keep_last=1)
        trainer.fit([rows] * 4, checkpoint_dir=f"{folder}/all", checkpoint_every=policy, verbose=0)
        path = Path(folder, "one")
        for _ in range(sizes.repeats):
            found["save"].append(_seconds(lambda: trainer.save(path)))
            found["load"].append(_seconds(lambda: trainer.load(path)))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    save, load = (statistics.median(found[name]) for name in ("save", "load"))
    return {"mib": size / MIB, "save_ms": 1e3 * save, "load_ms": 1e3 * load}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("device", f"{found['machine']['device']}, {found['machine']['system']}")]
    for fit in found["fit"]:
        size, over = f"{fit['width']} x {fit['batch_size']}", f"{fit['over_us']:+.0f} us"
        rows += [
            (f"fit / loop by hand, {size}", _interval(fit["ratio"])),
            ("  a loop / its equal: noise", _interval(fit["noise"])),
            ("  a step by hand, with fit", f"{fit['step_ms']:.2f} ms, {over}"),
            ("  calls of mlx_fit a batch", f"{fit['calls_per_batch']:.0f}"),
        ]
    for name, speed in found["product"].items():
        rows.append((f"1024 x 1024 product, {name}", f"{speed['gflops']:.0f} GFLOP/s"))
    loader, saved = found["loader"], found["checkpoint"]
    rate = f"{loader['rows_per_second']:,.0f} rows/s"
    rows.append(("loader, 28 x 28 bytes", rate))
    rows.append(("  NumPy's indexing alone", f"{loader['numpy_rows_per_second']:,.0f} rows/s"))
    for verb in ("save", "load"):
        ms = saved[f"{verb}_ms"]
        speed = f"{ms:.0f} ms, {1e3 * saved['mib'] / ms:,.0f} MiB/s with hashes"
        rows.append((f"{verb} {format_bytes(round(saved['mib'] * MIB))}", speed))
    return rows


def _interval(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['low']:.3f}-{values['high']:.3f})"
