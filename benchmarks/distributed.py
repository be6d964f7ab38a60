"""What does training on several ranks cost, on this machine and over a slow link?

- The sum of all gradients, against ``mlx.nn.average_gradients``, in turn in the same processes.
- Bytes of an update, and seconds of a batch, for each way of sending gradients; over loopback, and
  between the same ranks when loopback is slowed to SLOW_MBIT (Linux, root: a network namespace
  with a token bucket; both directions share it).
- Rows a second with one rank and with two, one thread each.
- A batch of 32 rows on two ranks that read 300 and 100 rows a second, without and with balance.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_fit  # first: it may have to load a BLAS before mlx.core
from mlx_fit import DistributedTrainer, SyncPolicy

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip
from mlx.utils import tree_map  # isort: skip
from mlx_fit._tree import named_arrays  # isort: skip
from mlx_fit.distributed.buckets import Buckets  # isort: skip

ROUNDS = int(os.environ.get("ROUNDS", "9"))
SLOW_MBIT = int(os.environ.get("SLOW_MBIT", "100"))
WIDTH = 1100  # about 2.5 million parameters
# The second counts this process alone; while it waits for the other, MLX's ring counts too.
CLOCKS = {"seconds": time.perf_counter, "processor time": time.process_time}
NAMESPACE = f"mlx-fit-bench-{os.getpid()}"
SCHEMES: dict[str, tuple[SyncPolicy, int]] = {
    "float32": (SyncPolicy(), 1),
    "bfloat16": (SyncPolicy(reduce_dtype="bfloat16"), 1),
    "int8": (SyncPolicy(compress="int8"), 1),
    "powersgd:4": (SyncPolicy(compress="powersgd:4"), 1),
    "bfloat16, accumulate 8": (SyncPolicy(reduce_dtype="bfloat16"), 8),
}


def make_model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def make_data(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, WIDTH)).astype(np.float32), np.zeros((rows, WIDTH), np.float32)


class Clock(mlx_fit.Callback):
    """Seconds and bytes from the end of batch ``first`` to the last one, of the newest epoch."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.start = 0.0
        self.seconds = 0.0
        self.bytes_before = 0
        self.num_bytes = 0

    def on_train_batch_end(self, batch: int, logs: object) -> None:
        num_bytes = getattr(self.trainer.communicator, "num_bytes", 0)
        if batch == self.first:  # what is compiled is not counted
            self.start, self.bytes_before = time.perf_counter(), num_bytes
        self.seconds = time.perf_counter() - self.start
        self.num_bytes = num_bytes - self.bytes_before


# --- what each rank does --------------------------------------------------------------------------


def sums() -> dict[str, Any]:
    """How long the sum of a model's gradients takes, in MLX's own, by each clock."""
    trainer = DistributedTrainer(make_model(), optim.SGD(0.1), "mse")
    gradients = tree_map(mx.ones_like, trainer.model.trainable_parameters())
    buckets, named = Buckets(SyncPolicy()), dict(named_arrays(gradients))

    def ours() -> None:
        mx.eval(list(buckets.summed(trainer.communicator, named).values()))

    def theirs() -> None:
        mx.eval(nn.average_gradients(gradients, communication_stream=mx.cpu))

    def taken(work: Callable[[], None], clock: Callable[[], float]) -> float:
        start = clock()
        work()
        return 1e3 * (clock() - start)

    ours(), theirs()
    found: dict[str, list[float]] = {}
    for name, clock in CLOCKS.items():
        found[name] = []
        for number in range(40 * ROUNDS):  # the first of two also waits for the other rank: in turn
            order = (ours, theirs) if number % 2 else (theirs, ours)
            one, other = (taken(work, clock) for work in order)
            found[name].append(one / other if number % 2 else other / one)
    return found


def schemes() -> dict[str, Any]:
    """Seconds of a batch and bytes of an update for each scheme, a fit each."""
    found = {}
    for name, (sync, accumulation) in SCHEMES.items():
        trainer = DistributedTrainer(
            *(make_model(), optim.SGD(0.1), "mse"),
            sync=sync,
            gradient_accumulation=accumulation,
            batch_size=64,
        )
        num_batches = accumulation + max(4, 2 * accumulation)
        clock = Clock(first=accumulation - 1)
        trainer.fit(make_data(64 * num_batches), callbacks=clock, verbose=0)
        num_timed = num_batches - accumulation
        found[name] = {
            "seconds": clock.seconds / num_timed,
            "mb": clock.num_bytes / 1e6 / (num_timed / accumulation),
        }
    return found


def speed() -> dict[str, Any]:
    """Rows a second."""
    trainer = DistributedTrainer(make_model(), optim.SGD(0.1), "mse", batch_size=512)
    data = make_data(512 * 8)
    trainer.fit(data, verbose=0)
    start = time.perf_counter()
    trainer.fit(data, epochs=3, verbose=0)
    return {"rows": 3 * len(data[0]) / (time.perf_counter() - start)}


class SlowRows:
    """300 rows a second on rank 0, 100 on the others."""

    def __init__(self, rank: int) -> None:
        self.x, self.y = make_data(256)
        self.rate = 100 if rank else 300

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(len(indices) / self.rate)
        return self.x[indices], self.y[indices]


def balance() -> dict[str, Any]:
    """Milliseconds of a batch in the last of five epochs."""
    found = {}
    for is_on in (False, True):
        clock = Clock()
        trainer = DistributedTrainer(
            make_model(), optim.SGD(0.1), "mse", batch_size=32, balance=is_on
        )
        trainer.fit(SlowRows(trainer.rank), epochs=5, callbacks=clock, verbose=0)
        found["on" if is_on else "off"] = 1e3 * clock.seconds / 7
    return found


WORK = {work.__name__: work for work in (sums, schemes, speed, balance)}


# --- and who starts them --------------------------------------------------------------------------


def on_ranks(work: str, size: int, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """What rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [*prefix, sys.executable, "-m", "mlx_fit.cli", "launch", "-n", str(size), "--"]
        command += [sys.executable, __file__, work, str(out)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def slow_link() -> tuple[str, ...]:
    """A prefix that runs a command where loopback is slow; empty if that cannot be had."""
    if os.geteuid() != 0 or not shutil.which("tc") or not shutil.which("ip"):
        return ()
    inside = ("ip", "netns", "exec", NAMESPACE)
    limit = ("tbf", "rate", f"{SLOW_MBIT}mbit", "burst", "128kb", "latency", "200ms")
    for command in (
        ("ip", "netns", "add", NAMESPACE),
        (*inside, "ip", "link", "set", "lo", "up"),
        (*inside, "tc", "qdisc", "add", "dev", "lo", "root", *limit),
    ):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return ()
    return inside


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    for name, ratios in on_ranks("sums", 2).items():
        print(f"sum of 2.4 M gradients / nn.average_gradients, {name}: {spread(ratios)}")
    prefix = slow_link()
    try:
        tables = {"loopback": on_ranks("schemes", 2)}
        if prefix:
            tables[f"{SLOW_MBIT} Mbit/s"] = on_ranks("schemes", 2, prefix)
    finally:
        if prefix:
            subprocess.run(("ip", "netns", "del", NAMESPACE), check=False)
    for link, found in tables.items():
        whole = found["float32"]
        print(f"\n| {link} | MB an update | of float32 | s a batch | times as fast |")
        print("|---|---|---|---|---|")
        for name, row in found.items():
            share, gain = row["mb"] / whole["mb"], whole["seconds"] / row["seconds"]
            print(f"| {name} | {row['mb']:.2f} | {share:.2f} | {row['seconds']:.3f} | {gain:.1f} |")
    ratios = [on_ranks("speed", 2)["rows"] / on_ranks("speed", 1)["rows"] for _ in range(3)]
    print(f"\nrows a second, 2 ranks / 1: {spread(ratios)}")
    found = on_ranks("balance", 2)
    print(f"batch of 32 at 300 and 100 rows a second: {found['off']:.0f} ms, ", end="")
    print(f"balanced {found['on']:.0f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        result = WORK[sys.argv[1]]()
        if os.environ.get("MLX_RANK", "0") == "0":
            Path(sys.argv[2]).write_text(json.dumps(result))
    else:
        main()
