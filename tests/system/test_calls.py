"""What a steady batch costs in Python: calls of this project's own functions."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

import mlx_fit
from mlx_fit import (
    Callback,
    CSVLogger,
    DataLoader,
    DeviceMonitor,
    EarlyStopping,
    GradientMonitor,
    JSONLogger,
    TensorBoard,
    Trainer,
)

ROOT = str(Path(mlx_fit.__file__).parent)
LIMIT = 15


class Profile(Callback):
    """Counts calls between two ends of a batch, of steady batches between two rows of the log."""

    def __init__(self, batches):
        super().__init__()
        self.calls = []
        self._batches = batches
        self._counter = Counter()

    def on_train_batch_end(self, batch, logs):
        sys.setprofile(None)
        if self._counter:
            self.calls.append(self._counter)
        self._counter = Counter()
        if batch in self._batches:
            sys.setprofile(self._note)

    def on_epoch_end(self, epoch, logs):
        sys.setprofile(None)

    def _note(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            self._counter[f"{code.co_filename.removeprefix(ROOT)}:{code.co_name}"] += 1


def batches_of(arrays, batch_size):
    """Batches that nothing reads ahead: whether that pays is told by time, and it is a call."""
    return DataLoader(arrays, batch_size, prefetch_factor=0)


def calls_of_a_steady_batch(tmp_path, **options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 4)).astype(np.float32), rng.integers(0, 3, 400)
    trainer = Trainer(
        nn.Linear(4, 3),
        optim.Adam(0.01),
        "cross_entropy",
        ["accuracy", "precision"],
        **options,
    )
    profile = Profile(range(31, 38))
    data = batches_of((x, y), 10)
    try:
        trainer.fit(data, epochs=1, callbacks=[profile, TensorBoard(tmp_path)], verbose=1)
    finally:
        sys.setprofile(None)
    assert len(profile.calls) == 7
    return profile.calls


def describe(calls):
    return "\n".join(f"{count} {name}" for name, count in calls.items())


def test_a_steady_batch_makes_at_most_15_calls(tmp_path, capsys):
    """With metrics, the bar and TensorBoard on."""
    usual = min(calls_of_a_steady_batch(tmp_path), key=lambda calls: calls.total())
    assert usual.total() <= LIMIT, describe(usual)


def test_watchers_that_only_look_add_no_calls(tmp_path, capsys):
    """They look when an epoch ends; the wait for data is measured by the loop itself.

    One of the calls is for the profile: after user code the step looks at what it has compiled in.
    """
    watchers = [
        TensorBoard(tmp_path),
        CSVLogger(tmp_path / "a.csv"),
        JSONLogger(tmp_path / "a.jsonl"),
        DeviceMonitor(),
        EarlyStopping("loss"),
        GradientMonitor(),
    ]
    counts = []
    for callbacks in ([], watchers):
        profile = Profile(range(31, 38))
        x, y = np.zeros((400, 4), np.float32), np.zeros(400, np.int32)
        trainer = Trainer(nn.Linear(4, 3), optim.Adam(0.01), "cross_entropy")
        try:
            trainer.fit(batches_of((x, y), 10), callbacks=[profile, *callbacks], verbose=0)
        finally:
            sys.setprofile(None)
        counts.append(min(calls.total() for calls in profile.calls))
    assert counts[0] == counts[1] <= LIMIT, describe(profile.calls[0])


def test_every_batch_between_two_looks_costs_the_same(tmp_path, capsys):
    """Only a redraw of the bar, at most 10 a second, may come on top."""
    totals = [calls.total() for calls in calls_of_a_steady_batch(tmp_path)]
    assert sorted(totals)[len(totals) // 2] <= LIMIT


class Deep(nn.Module):
    """Parameters in a list, two for each layer."""

    def __init__(self, depth):
        super().__init__()
        self.layers = [nn.Linear(2, 2) for _ in range(depth)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def python_calls(depth, batches, num_rows):
    """Calls of all Python functions, whoever wrote them, in each of some batches."""
    profile = Profile(batches)
    profile._note = lambda frame, event, _: profile._counter.update([event])
    trainer = Trainer(Deep(depth), optim.AdamW(0.01), "cross_entropy")
    rows = np.zeros((num_rows, 2), np.float32), np.zeros(num_rows, np.int32)
    try:
        trainer.fit(batches_of(rows, 1), callbacks=[profile], verbose=0)
    finally:
        sys.setprofile(None)
    return min(calls["call"] for calls in profile.calls)


def test_a_batch_costs_as_much_after_10000_steps_as_after_10():
    early, late = (python_calls(1, range(n, n + 8), n + 9) for n in (10, 10_000))
    assert early == late > 0


def test_a_thousand_parameters_cost_no_more_calls_than_ten():
    few, many = (python_calls(depth, range(11, 18), 20) for depth in (5, 500))
    assert few == many > 0
