"""What does ``import mlx_fit`` cost over NumPy, OpenBLAS and MLX, which it cannot do without?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = int(os.environ.get("ROUNDS", "11"))
# The BLAS is loaded in both, or neither: with `mlx-fit doctor --fix-blas` MLX's import brings it.
BASE = "import numpy, mlx.core, mlx.nn, mlx.optimizers"
OURS = "import mlx_fit"  # names are loaded when they are first used
TRAINER = "from mlx_fit import Trainer"  # with the data, checkpoints and progress it is made of
CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", CLOCK.format(statement)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout)


def main() -> None:
    statements = {"numpy, mlx.core, mlx.nn, mlx.optimizers": BASE, OURS: OURS, TRAINER: TRAINER}
    times: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(ROUNDS + 1):
        for name, statement in statements.items():
            times[name].append(seconds(statement))
    print(f"import time, {ROUNDS} rounds in turn, each a fresh process")
    base, *ours = times.items()
    print(f"{base[0]:40} {statistics.median(base[1][1:]) * 1e3:6.0f} ms")
    for name, taken in ours:
        ratios = [o / b for o, b in zip(taken[1:], base[1][1:], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:40} {statistics.median(taken[1:]) * 1e3:6.0f} ms, ratio {spread}")


if __name__ == "__main__":
    main()
