"""Fixtures that tests of several parts of the package share."""

from __future__ import annotations

import signal

import mlx.core as mx
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` need one; docs/gpu.md says how they are run."""
    if mx.is_available(mx.gpu):
        return
    skip = pytest.mark.skip(reason="MLX has no GPU here (docs/gpu.md says how to run these)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def rng():
    """A NumPy generator of fixed seed; MLX's key is fixed with it."""
    mx.random.seed(0)
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Python's own handlers during a test; a job in the background starts without."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
