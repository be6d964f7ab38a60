"""Many steps of batches of varying shapes: memory must stay flat. ``make soak-memory`` runs it.

python tests/soak_memory.py --steps 20000 [--eager] [--leak]
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlx_fit import Callback, Trainer
from mlx_fit.runtime.memory import process_rss_bytes

SHAPES = [(rows, width) for rows in (2, 5, 9) for width in (3, 8, 13)]


class Measure(Callback):
    """Live arrays, cache and resident memory at ten places of the run."""

    def __init__(self, num_steps, leaks):
        self.rows = []
        self._every, self._leaks, self._kept = num_steps // 10, leaks, []

    def on_train_batch_end(self, batch, logs):
        if self._leaks:
            self._kept.append(mx.zeros((64,)) + 1)
            mx.eval(self._kept[-1])
        if (batch + 1) % self._every == 0:
            gc.collect()
            self.rows.append((mx.get_active_memory(), mx.get_cache_memory(), process_rss_bytes()))


def batches(num_steps):
    rng = np.random.default_rng(0)
    pool = []
    for rows, width in SHAPES:
        tokens = rng.integers(0, 20, (rows, width)).astype(np.int32)
        pool.append((tokens, np.roll(tokens, 1)))
    for number in rng.integers(0, len(pool), num_steps):
        yield pool[number]


def run(num_steps, compile=True, leaks=False):
    """The measures of a run: (active, cache, resident) bytes after each tenth of its steps."""
    mx.set_cache_limit(mx.get_memory_limit())  # as on Metal: the fit has to bound it
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    trainer = Trainer(
        model, optim.Adam(1e-3), "cross_entropy", ["accuracy"], compile=compile, seed=0
    )
    measure = Measure(num_steps, leaks)
    trainer.fit(
        lambda: batches(num_steps),
        steps_per_epoch=num_steps,
        callbacks=measure,
        log_every=num_steps // 100,
        verbose=0,
    )
    return measure.rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--leak", action="store_true", help="keep an array a step: must fail")
    given = parser.parse_args()
    rows = run(given.steps, not given.eager, given.leak)
    for number, (active, cache, resident) in enumerate(rows, 1):
        print(f"{number * 10:3d} %: {active:,} B live, {cache:,} B cached, {resident:,} B resident")
    second, last = rows[1], rows[-1]
    is_flat = last[0] <= second[0] + 10_000 and last[1] <= second[1] + 1_000_000
    is_flat = is_flat and last[2] <= second[2] + 8_000_000
    print("flat" if is_flat else "grows")
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
