"""Fixtures that tests of several parts of the package share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest


@pytest.fixture
def rng():
    """A NumPy generator of fixed seed; MLX's key is fixed with it."""
    mx.random.seed(0)
    return np.random.default_rng(0)
