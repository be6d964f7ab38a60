"""Datasets for worker processes, which import this module: so without MLX, torch or pytest."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import numpy as np


class Rows:
    """``make(index)`` for each of ``n`` rows."""

    def __init__(self, make, n=40):
        self.make = make
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.make(index)


class Stream:
    """Rows 0 to n - 1, one after the other."""

    def __init__(self, n):
        self.n = n
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from range(100 * self.epoch, 100 * self.epoch + self.n)


class StatefulStream:
    """Rows 0 to n - 1, from the place that a state names; counts what it reads."""

    def __init__(self, n):
        self.n = n
        self.state = {"next": 0}
        self.num_read = 0
        self.is_loaded = False

    def __iter__(self):
        if not self.is_loaded:
            self.state["next"] = 0
        self.is_loaded = False
        while self.state["next"] < self.n:
            self.state["next"] += 1
            self.num_read += 1
            yield self.state["next"] - 1

    def state_dict(self):
        return self.state  # alive: it changes as rows are read

    def load_state_dict(self, state):
        self.state, self.is_loaded = dict(state), True


class OddError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, code, *, reason):
        super().__init__(f"{reason} ({code})")


def large(index):
    return {"x": np.full((100 * (index // 12 + 1), 50), index, np.float64), "i": index}


def missing_field(index):
    return {"i": index}["i" if index != 37 else "from"]


def odd_error(index):
    raise OddError(3, reason="odd")


def killed(index):
    if index == 37:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def exits(index):
    raise SystemExit(3)


def hangs(index):
    if index == 37:
        time.sleep(60)
    return index


def mlx_row(index):
    import mlx.core as mx

    return {"x": mx.array([index])}


def mlx_batch(samples):
    import mlx.core as mx

    return mx.array(samples)


def global_draws(index):
    return np.random.random(), random.random(), os.getpid()  # noqa: NPY002


def has_mlx(index):
    return "mlx.core" in sys.modules


def noisy(row, rng):
    return row + rng.random()


def slowly(index):
    time.sleep(0.002)
    return index


def strings(index):
    return {"text": str(index), "x": np.zeros((index % 2,), np.int32)}


def as_list(samples):
    return samples


def collate_slowly(samples):
    time.sleep(0.002)
    return samples


def set_worker(worker):
    os.environ["TEST_WORKER"] = str(worker)


def pair(index):
    return np.float32([index, 1]), np.float32(index % 3)


def noisy_pair(row, rng):
    return row[0] + rng.normal(size=2).astype(np.float32), row[1]


def worker_number(index):
    return int(os.environ["TEST_WORKER"])


def bad_init(worker):
    raise OSError("no such device")
