"""How near is ``trainer.plan(batch)`` to the peak that is measured, and what does it cost?

Each row is a fresh process: the plan first, then twelve steps of ``fit``, whose highest peak by
MLX's own counter is the measured one. "plan / step" is the time of the plan in steps. The second
table is the guard of ``fit`` on small models: microseconds once a fit, without a memory limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings

import mlx_fit  # first: it may have to load a BLAS before mlx.core

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip

ROWS = {"mlp": 1024, "cnn": 64, "transformer": 32}
CASES = [
    # optimizer, precision, accumulation, compiled
    ("sgd", "float32", 1, True),
    ("adamw", "float32", 1, True),
    ("adafactor", "float32", 1, True),
    ("adamw", "mixed_bfloat16", 1, True),
    ("adamw", "bfloat16", 1, True),
    ("adamw", "float32", 4, True),
    ("sgd", "mixed_bfloat16", 4, True),
    ("adamw", "float32", 1, False),
    ("adamw", "float32", 4, False),
]


class Image(nn.Module):
    """Three convolutions on 32 x 32 images, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm(16),
            nn.Conv2d(16, 32, 3, 2, padding=1),
            nn.BatchNorm(32),
            nn.Conv2d(32, 64, 3, 2, padding=1),
        ]
        self.head = nn.Linear(64 * 64, 10)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Conv2d) else nn.relu(layer(x))
        return self.head(nn.relu(x).reshape(x.shape[0], -1))


class Words(nn.Module):
    """Two transformer blocks over 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.blocks = [nn.TransformerEncoderLayer(128, 4, 512) for _ in range(2)]
        self.head = nn.Linear(128, 1000)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head(x)


def make(kind: str) -> tuple[nn.Module, tuple[np.ndarray, np.ndarray]]:
    rng, rows = np.random.default_rng(0), ROWS[kind]
    labels = rng.integers(0, 10, rows)
    if kind == "mlp":
        layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(0.1), nn.Linear(1024, 1024)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(1024, 10))
        return model, (rng.normal(size=(rows, 784)).astype(np.float32), labels)
    if kind == "cnn":
        return Image(), (rng.normal(size=(rows, 32, 32, 3)).astype(np.float32), labels)
    tokens = rng.integers(0, 1000, (rows, 65))
    return Words(), (tokens[:, :-1], tokens[:, 1:])


def measure(kind: str, optimizer: str, precision: str, accumulation: int, compiled: bool) -> None:
    """In a process of its own: prints what was predicted and measured, as JSON."""
    warnings.simplefilter("ignore")
    model, batch = make(kind)
    mx.eval(model.state)
    optimizers = {
        "sgd": lambda: optim.SGD(0.01, momentum=0.9),
        "adamw": lambda: optim.AdamW(1e-3),
        "adafactor": lambda: optim.Adafactor(1e-3),
    }
    trainer = mlx_fit.Trainer(
        model,
        optimizers[optimizer](),
        "cross_entropy",
        precision=precision,
        gradient_accumulation=accumulation,
        compile=compiled,
    )
    start = time.perf_counter()
    plan = trainer.plan(batch)
    seconds, peaks, times = time.perf_counter() - start, [], []

    def begin(*_: object) -> None:
        mx.reset_peak_memory()
        times.append(time.perf_counter())

    watch = mlx_fit.LambdaCallback(
        on_train_batch_begin=begin,
        on_train_batch_end=lambda *_: peaks.append(mx.get_peak_memory()),
    )
    trainer.fit([batch] * 12, callbacks=watch, verbose=0)
    step = float(np.median(np.diff(times)))
    print(json.dumps([plan.peak_bytes, max(peaks), seconds / step]))


def guard_microseconds() -> list[float]:
    """The guard's look at a new shape of a small model, which is all that it costs there."""
    from mlx_fit.foresight import Foresight
    from mlx_fit.objective import Supervised
    from mlx_fit.options import StepOptions

    found = []
    for kind in ROWS:
        model, batch = make(kind)
        small = tuple(part[:8] for part in batch)
        times = []
        for _ in range(20):
            foresight = Foresight(
                model, optim.SGD(0.1), Supervised("cross_entropy"), StepOptions(), False
            )
            start = time.perf_counter()
            foresight(small)
            times.append((time.perf_counter() - start) * 1e6)
        found.append(float(np.median(times)))
    return found


def main() -> None:
    names = ("model", "optimizer", "precision", "accumulation", "compiled")
    print(f"| {' | '.join(names)} | predicted, MB | measured, MB | ratio | plan / step |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = []
    for kind in ROWS:
        for case in CASES:
            code = f"import memory; memory.measure({kind!r}, *{case!r})"
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                cwd=__file__.rpartition("/")[0],
            )
            predicted, measured, cost = json.loads(done.stdout.splitlines()[-1])
            ratios.append(predicted / measured)
            row = [kind, *case, f"{predicted / 1e6:.1f}", f"{measured / 1e6:.1f}"]
            row += [f"{ratios[-1]:.2f}", f"{cost:.1f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    outside = sum(not 0.85 <= ratio <= 1.15 for ratio in ratios)
    print(f"\n{min(ratios):.2f} to {max(ratios):.2f}; {outside} of {len(ratios)} beyond 15 %.")
    print(
        "\nThe guard without a limit, us once for a shape: "
        + ", ".join(f"{k} {t:.0f}" for k, t in zip(ROWS, guard_microseconds(), strict=True))
    )


if __name__ == "__main__":
    main()
