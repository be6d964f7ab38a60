"""Leave a loader early again and again, and look at what stays behind.

    python tests/soak_loader.py --times 50 --workers 2

A warm-up first, because the first use of processes starts multiprocessing's resource tracker, which
stays. Then each pass is left after another number of batches, one to all.
Prints what there is before and after, and exits with 1 if anything is more.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "data"))

import worker_datasets as sets

from mlx_fit.data import DataLoader

ROWS, BATCH_SIZE = 40, 4


def entries(folder: str, prefix: str = "") -> int:
    if not os.path.isdir(folder):
        return 0  # not Linux
    return sum(name.startswith(prefix) for name in os.listdir(folder))


def left_overs() -> dict[str, int]:
    gc.collect()
    return {
        "processes": len(multiprocessing.active_children()),
        "threads": threading.active_count(),
        "files": entries("/proc/self/fd"),
        "shared memory": entries("/dev/shm", "psm_"),
    }


def leave(num_workers: int, num_batches: int) -> None:
    """Take so many batches of a pass, and no more."""
    batches = iter(DataLoader(sets.Rows(sets.large, ROWS), BATCH_SIZE, num_workers=num_workers))
    for _ in range(num_batches):
        next(batches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    leave(options.workers, 1)
    before, start = left_overs(), time.perf_counter()
    for number in range(options.times):
        leave(options.workers, 1 + number % (ROWS // BATCH_SIZE))
    seconds = (time.perf_counter() - start) / options.times
    after = left_overs()
    deadline = time.monotonic() + 3  # a thread may still be at its end
    while after != before and time.monotonic() < deadline:
        time.sleep(0.1)
        after = left_overs()
    print(f"left {options.times} times with {options.workers} workers, {seconds:.2f} s each")
    print(f"before {before}\nafter  {after}")
    return int(any(after[name] > before[name] for name in before))


if __name__ == "__main__":
    sys.exit(main())
