import zlib

import numpy as np
import pytest

from mlx_fit.data import DataLoader, Map, MapBatches, Subset
from mlx_fit.errors import ConfigurationError, DataError


def noise(batch, rng):
    return batch + rng.random(batch.shape)


def double(row, rng):
    return row * 2


def flat(loader):
    return np.concatenate(list(loader)).tolist()


def test_a_batch_is_transformed_by_one_call_with_draws_of_seed_epoch_and_rows():
    calls = []

    def f(batch, rng):
        calls.append(batch.tolist())
        return noise(batch, rng)

    loader = DataLoader(MapBatches(np.arange(6.0), f), 4, seed=3)
    for epoch in range(2):
        for batch, indices in zip(loader, ([0, 1, 2, 3], [4, 5]), strict=True):
            rows = np.array(indices, np.int64)
            entropy = [3, epoch, zlib.crc32(rows.tobytes()), len(rows)]
            drawn = np.random.default_rng(entropy).random(len(rows))
            np.testing.assert_allclose(batch, rows + drawn, rtol=1e-6)
    assert calls == [[0, 1, 2, 3], [4, 5]] * 2


def test_transforms_of_rows_and_batches_are_composed():
    data = MapBatches(Map(np.arange(6.0), double), lambda batch, rng: batch + 1)
    assert flat(DataLoader(data, 4)) == [1, 3, 5, 7, 9, 11]
    assert flat(DataLoader(Subset(data, [5, 0]), 2)) == [11, 1]
    assert flat(DataLoader(MapBatches(data, lambda batch, rng: -batch), 4))[1] == -3


def test_the_number_of_workers_and_a_resume_change_no_draw():
    def make(num_workers):
        data = MapBatches(np.arange(12.0), noise)
        return DataLoader(data, 4, True, num_workers=num_workers, seed=1)

    whole = flat(make(0))
    assert flat(make(2)) == whole
    resumed = make(0)
    resumed.load_state_dict({**resumed.state_dict(), "samples_consumed": 8})
    assert flat(resumed) == whole[8:]


def test_a_row_is_a_batch_of_itself():
    data = MapBatches({"x": np.ones((4, 3)), "y": np.arange(4)}, lambda b, rng: {**b, "z": b["y"]})
    row = data[-1]
    assert (row["x"].shape, int(row["y"]), int(row["z"])) == ((3,), 3, 3)
    with pytest.raises(IndexError):
        data[4]


def test_a_result_of_another_length_is_an_error():
    with pytest.raises(DataError, match="returned 1 rows for 2 indices"):
        list(DataLoader(MapBatches(np.arange(4), lambda batch, rng: batch[:1]), 2))


def test_an_iterable_is_refused():
    with pytest.raises(ConfigurationError, match="collate_fn"):
        MapBatches(iter(()), noise)


@pytest.mark.parametrize("kind", [Map, MapBatches])
def test_what_is_no_function_is_refused(kind):
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__} got f=3; expected a function"):
        kind(range(3), 3)
