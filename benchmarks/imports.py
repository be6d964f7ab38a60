"""What does ``import mlx_fit`` cost over NumPy, OpenBLAS and MLX, which it cannot do without?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = int(os.environ.get("ROUNDS", "11"))
# The BLAS is loaded in both, or neither: with `mlx-fit doctor --fix-blas` MLX's import brings it.
BASE = "import numpy, mlx.core, mlx.nn, mlx.optimizers"
OURS = "import mlx_fit"
CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", CLOCK.format(statement)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout)


def main() -> None:
    seconds(BASE), seconds(OURS)
    base, ours = [], []
    for _ in range(ROUNDS):
        base.append(seconds(BASE))
        ours.append(seconds(OURS))
    ratios = [o / b for o, b in zip(ours, base, strict=True)]
    print(f"import time, {ROUNDS} rounds in turn, each a fresh process")
    print(f"numpy, mlx.core, mlx.nn, mlx.optimizers  {statistics.median(base) * 1e3:6.0f} ms")
    print(f"mlx_fit                                  {statistics.median(ours) * 1e3:6.0f} ms")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
