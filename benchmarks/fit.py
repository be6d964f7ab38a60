"""What does ``fit`` cost over a hand-written compiled MLX loop?

Both train the same network on the same NumPy data, in turn, in one process. The hand-written loop
does what a user would: slice, convert, one compiled step, one ``mx.eval``. ``fit`` has shuffling, a
metric, a bar and TensorBoard on. An epoch of ``fit`` is compared with the mean of the two by hand
that stand around it, so that a machine that grows slower counts on both sides. Also printed: a
second hand-written loop against the first in the same way, which is the noise; and the ratio in
processor time of all threads, which other work on the machine changes less (with
``OPENBLAS_NUM_THREADS=1``: threads that wait count, too). ``mlx-fit bench`` is the same for users.
"""

from __future__ import annotations

import os
import tempfile

import mlx_fit  # first: it may have to load a BLAS before mlx.core
from mlx_fit.cli.bench_fit import Comparison, against_hand, interval

import mlx.core as mx  # isort: skip

ROUNDS = int(os.environ.get("ROUNDS", "25"))
STEPS = 100


def summary(ratios: list[float]) -> str:
    """Median, the 95 % interval of the median, and all."""
    median, low, high = interval(ratios)
    return f"{median:>7.3f} {low:.3f}-{high:.3f} {min(ratios):.3f}-{max(ratios):.3f}"


COLUMNS = "  95% interval         all"
HEAD = f"ratio{COLUMNS}  over_us     cpu{COLUMNS}   noise{COLUMNS}"


def row(found: Comparison) -> str:
    """What stands below :data:`HEAD`."""
    cpu, noise = summary(found.cpu_ratios), summary(found.noise)
    return f"{summary(found.ratios)} {found.over_us:>8.0f} {cpu} {noise}"


def main() -> None:
    print(
        f"fit / hand-written loop, {STEPS} steps an epoch, {ROUNDS} rounds, {mx.default_device()}"
    )
    print(f" width  batch  step_ms   {HEAD}")
    for width, batch_size in ((64, 32), (512, 64), (512, 256), (1024, 256)):
        with tempfile.TemporaryDirectory() as folder:
            board = [mlx_fit.TensorBoard(folder)]
            found = against_hand(width, batch_size, STEPS, ROUNDS, board)
        print(f"{width:>6} {batch_size:>6} {found.step_ms:>8.2f} {row(found)}", flush=True)


if __name__ == "__main__":
    main()
