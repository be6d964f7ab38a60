"""How much faster is MLX on a Linux CPU with OpenBLAS than with the reference BLAS of its wheel?

Two things are timed in fresh processes that differ in ``MLX_FIT_BLAS`` alone, in turn:
a training step that is mostly products (784-256-10 network, batch of 256, SGD), and a product of
two 1024 x 1024 float32 matrices. The ratio is slow / fast; the goal is 4 or more.

    python benchmarks/blas.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

GOAL = 4.0


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return 0
    rounds = [(process("off"), process("")) for _ in range(arguments.rounds)]
    if rounds[0][1]["library"] is None:
        print(f"No fast BLAS was loaded: {rounds[0][1]['reason']}", file=sys.stderr)
        return 1
    print(f"{rounds[0][1]['library']}\n{arguments.rounds} rounds in turn, median (min to max)\n")
    print(f"{'':<16}{'off, ms':>24}{'on, ms':>24}{'off / on':>24}")
    for name in ("training step", "1024^3 product"):
        slow = [off[name] for off, _ in rounds]
        fast = [on[name] for _, on in rounds]
        ratios = [off / on for off, on in zip(slow, fast, strict=True)]
        print(f"{name:<16}{spread(slow):>24}{spread(fast):>24}{spread(ratios):>24}")
    print(f"\nGoal: {GOAL:.0f} or more.")
    return 0


def process(choice: str) -> dict:
    """What :func:`measure` says in a fresh process with this ``MLX_FIT_BLAS``."""
    command = [sys.executable, __file__, "--measure"]
    environment = {**os.environ, "MLX_FIT_BLAS": choice}
    return json.loads(subprocess.check_output(command, env=environment))


def measure() -> dict:
    """Milliseconds of both jobs in this process, and the library it has loaded."""
    from mlx_fit.runtime import blas

    status = blas.preload()
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.relu, nn.Linear(256, 10))
    x, y = mx.random.normal((256, 784)), mx.random.randint(0, 10, (256,))
    optimizer = optim.SGD(1e-3)
    optimizer.init(model.trainable_parameters())
    gradients_of = nn.value_and_grad(
        model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean")
    )

    def step() -> None:
        _, gradients = gradients_of(x, y)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)

    left, right = mx.random.normal((2, 1024, 1024))
    mx.eval(left, right)
    return {
        "library": status.library,
        "reason": status.reason,
        "training step": milliseconds(step, 30),
        "1024^3 product": milliseconds(lambda: mx.eval(left @ right), 5),
    }


def milliseconds(job: Callable[[], None], count: int) -> float:
    """Median time of ``count`` calls, after a few to warm up."""
    times = []
    for index in range(count + 3):
        start = time.perf_counter()
        job()
        if index >= 3:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
