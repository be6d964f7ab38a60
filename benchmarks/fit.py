"""What does ``fit`` cost over a hand-written compiled MLX loop?

Both train the same network on the same NumPy data, in turn, in one process. The hand-written loop
does what a user would: slice, convert, one compiled step, one ``mx.eval``. ``fit`` has shuffling, a
metric, a bar and TensorBoard on. An epoch of ``fit`` is compared with the mean of the two by hand
that stand around it, so that a machine that grows slower counts on both sides. Also printed: a
second hand-written loop against the first in the same way, which is the noise; and the time of a
step beyond one by hand, by the clock and in processor time of all threads. ``mlx-fit bench`` is the
same for users.
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


def over(found: Comparison) -> str:
    """What a step of ``fit`` takes beyond one by hand."""
    return f"{found.over_us:>8.0f} {found.over_cpu_us:>8.0f}"


def main() -> None:
    print(
        f"fit / hand-written loop, {STEPS} steps an epoch, {ROUNDS} rounds, {mx.default_device()}"
    )
    columns = "  95% interval         all"
    print(f" width  batch  step_ms   ratio{columns}  over_us   cpu_us   noise{columns}")
    for width, batch_size in ((64, 32), (512, 64), (512, 256), (1024, 256)):
        with tempfile.TemporaryDirectory() as folder:
            board = [mlx_fit.TensorBoard(folder)]
            found = against_hand(width, batch_size, STEPS, ROUNDS, board)
        print(
            f"{width:>6} {batch_size:>6} {found.step_ms:>8.2f} {summary(found.ratios)} "
            f"{over(found)} {summary(found.noise)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
