"""Real processes in a small address space: the unguarded one dies, the guarded one raises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or mx.default_device() != mx.cpu,
    reason="RLIMIT_AS on Linux, and a CPU that allocates from it",
)

PASS_ROOM = 80  # MiB: less than the forward pass of the whole batch takes
BEGIN = """
import resource, sys
import numpy as np
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
from mlx_fit import OutOfMemoryError, Trainer

mx.random.seed(0)
model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                      nn.Linear(1024, 8))
optimizer = optim.AdamW(0.01)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(16_000, 64)).astype(np.float32), rng.integers(0, 8, 16_000)

def warm_up():
    # What compiling, threads and libraries map is mapped before the limit is set.
    Trainer(model, optimizer, "cross_entropy").fit((x[:64], y[:64]), verbose=0)

def confine(room):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

warm_up()
confine(200 << 20)
"""
BARE = """
def loss(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="mean")

step = nn.value_and_grad(model, loss)
value, gradients = step(model, mx.array(x), mx.array(y))
optimizer.update(model, gradients)
mx.eval(model.parameters(), optimizer.state, value)
print("trained", value.item())
"""
GUARDED = """
trainer = Trainer(model, optimizer, "cross_entropy", batch_size=16_000)
try:
    trainer.fit((x, y), verbose=0, checkpoint_dir=sys.argv[1])
except OutOfMemoryError as error:
    print("raised", error.needed_bytes > error.limit_bytes, error.batch_size)
    print(error)
trainer = Trainer(model, optimizer, "cross_entropy", batch_size=1000)
print("then", trainer.fit((x, y), verbose=0).history["loss"][0] < 1e3)
"""
SPLIT = """
import warnings
warnings.simplefilter("ignore")
trainer = Trainer(model, optimizer, "cross_entropy", batch_size=16_000, on_oom="split")
print("split", trainer.fit((x, y), verbose=0).history["loss"][0] < 1e3, trainer.micro_batch_size)
"""
BARE_PASS = """
print("predicted", mx.array(model(mx.array(x))).sum().item())
"""
PASSES = """
trainer = Trainer(model, optimizer, "cross_entropy", batch_size=16_000)
for work in (trainer.evaluate, trainer.predict, lambda data, verbose: Trainer(
        model, optimizer, "cross_entropy", batch_size=64).fit(
        (x[:64], y[:64]), [data], verbose=0)):
    try:
        print("went on", work((x, y), verbose=0))
    except OutOfMemoryError as error:
        print("raised", error.needed_bytes > error.limit_bytes, error.batch_size)
        print(error)
print("then", trainer.evaluate((x, y), batch_size=500, verbose=0)["loss"] < 1e3)
"""
SPLIT_PASSES = """
import warnings
warnings.simplefilter("ignore")
trainer = Trainer(model, optimizer, "cross_entropy", batch_size=16_000, on_oom="split")
print("loss", trainer.evaluate((x, y), verbose=0)["loss"] < 1e3)
print("rows", trainer.predict(x, verbose=0).shape)
"""


def run(tmp_path, code, room=200):
    begin = BEGIN.replace("200 << 20", f"{room} << 20")
    command = [sys.executable, "-c", begin + code, str(tmp_path / "run")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_loop_by_hand_dies_of_a_failed_allocation(tmp_path):
    done = run(tmp_path, BARE)
    assert done.returncode != 0
    assert "trained" not in done.stdout


def test_fit_raises_before_the_allocation_and_trains_smaller_batches(tmp_path):
    done = run(tmp_path, GUARDED)
    assert done.returncode == 0, done.stderr
    assert "raised True 16000" in done.stdout
    assert "address space" in done.stdout
    assert "then True" in done.stdout


def test_fit_splits_and_trains_the_whole_batch(tmp_path):
    done = run(tmp_path, SPLIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("split True")
    assert int(done.stdout.split()[-1]) < 16_000


def test_a_forward_pass_by_hand_dies_of_a_failed_allocation(tmp_path):
    done = run(tmp_path, BARE_PASS, PASS_ROOM)
    assert done.returncode != 0
    assert "predicted" not in done.stdout


def test_evaluation_prediction_and_validation_raise_before_the_allocation(tmp_path):
    done = run(tmp_path, PASSES, PASS_ROOM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("raised True 16000") == 3
    assert done.stdout.count("address space") == 3
    assert "went on" not in done.stdout
    assert "then True" in done.stdout


def test_evaluation_and_prediction_are_split(tmp_path):
    done = run(tmp_path, SPLIT_PASSES, PASS_ROOM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["loss True", "rows (16000, 8)"]
