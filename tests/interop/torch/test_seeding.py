"""One seed for every generator."""

import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_fit.errors import ConfigurationError
from mlx_fit.interop.torch import seed_everything


def draws():
    torch = pytest.importorskip("torch")
    return [
        random.random(),
        np.random.rand(),  # noqa: NPY002
        mx.random.uniform().item(),
        torch.rand(()).item(),
    ]


def test_every_generator_draws_the_same_again():
    assert seed_everything(3) == 3
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert not set(draws()) & set(first)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "a"])
def test_a_seed_that_numpy_would_not_take_is_refused(seed):
    with pytest.raises(ConfigurationError, match="seed="):
        seed_everything(seed)
