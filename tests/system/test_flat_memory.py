"""Memory over many steps of varying shapes; ``make soak-memory`` prints the figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from toys import Do, ramp, trainer_of

import mlx_fit.runtime.watch
from mlx_fit import DeviceConfig

SOAK = Path(__file__).parents[1] / "soak_memory.py"


def soak(*arguments):
    command = [sys.executable, str(SOAK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_20000_steps_of_varying_shapes_leave_memory_flat():
    done = soak("--steps", "20000")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_soak_notices_an_array_that_is_kept_each_step():
    done = soak("--steps", "2000", "--leak")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "grows"


def test_a_fit_bounds_the_cache_and_puts_the_limit_back():
    def limit_now():
        limit = mx.set_cache_limit(0)
        mx.set_cache_limit(limit)
        return limit

    seen, before = [], mx.set_cache_limit(mx.get_memory_limit())
    try:
        watch = Do("on_train_batch_end", lambda run: seen.append(limit_now()))
        trainer_of().fit(ramp(), callbacks=watch, log_every=1, verbose=0)
        assert limit_now() == mx.get_memory_limit()
    finally:
        mx.set_cache_limit(before)
    assert max(seen) < mx.get_memory_limit()


def test_a_fit_leaves_a_users_own_cache_limit():
    config, seen = DeviceConfig(cache_limit="123MB"), []

    def look(run):
        seen.append(mx.set_cache_limit(123_000_000))

    trainer = trainer_of(device_config=config)
    trainer.fit(ramp(), callbacks=Do("on_train_batch_end", look), log_every=1, verbose=0)
    assert set(seen) == {123_000_000}


def test_a_fit_looks_for_a_shortage(monkeypatch):
    monkeypatch.setattr(mlx_fit.runtime.watch, "SECONDS", 0.0)
    monkeypatch.setattr(
        mlx_fit.runtime.watch.PressureWatch, "found", lambda self: "memory is tight"
    )
    with pytest.warns(UserWarning, match="memory is tight") as caught:
        trainer_of().fit(ramp(), epochs=3, log_every=1, verbose=0)
    assert len(caught) == 1
