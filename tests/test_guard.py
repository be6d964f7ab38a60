"""What a guard makes of measurements that fail themselves."""

import mlx.nn as nn
import numpy as np
import pytest

from mlx_fit import OutOfMemoryError
from mlx_fit.guard import Guard


class Failing(Guard):
    """Its measurement raises."""

    def __init__(self, error):
        super().__init__(nn.Linear(4, 1), "A test", has_limit=True)
        self.error = error

    def growth(self, batch, limit):
        raise self.error

    def advice(self, growth, rows, limit):
        raise AssertionError


BATCH = (np.ones((8, 4), np.float32), np.ones((8, 1), np.float32))


def test_memory_that_a_few_rows_exceed_is_typed():
    with pytest.raises(OutOfMemoryError) as caught:
        Failing(RuntimeError("[malloc] Unable to allocate 123 bytes."))(BATCH)
    assert caught.value.batch_size == 8


def test_any_other_error_is_left_to_the_batch_itself():
    assert Failing(ValueError("a shape"))(BATCH) is None
