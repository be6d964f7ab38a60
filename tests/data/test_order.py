import time
import tracemalloc

import numpy as np
import pytest

from mlx_fit.data import order
from mlx_fit.data.order import FeistelOrder
from mlx_fit.errors import ConfigurationError


def keys(seed):
    return np.random.default_rng(seed).integers(2**64, size=8, dtype=np.uint64)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 1000])
def test_an_order_visits_each_sample_once(n):
    rows = order(seed=3, epoch=5, n=n)
    assert rows.dtype == np.int64
    assert sorted(rows.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 1000, 10_007])
def test_a_feistel_order_visits_each_sample_once(n):
    assert sorted(FeistelOrder(n, keys(1))[:].tolist()) == list(range(n))


def test_the_order_is_fixed_for_all_time():
    # A change here voids saved positions: raise ORDER_VERSION.
    assert order(0, 0, 10).tolist() == [8, 9, 5, 4, 7, 6, 3, 0, 2, 1]
    assert order(7, 3, 100_000_000)[:5].tolist() == [
        20125012,
        10947750,
        37035011,
        9199099,
        15765231,
    ]


def test_seed_and_epoch_do_not_collide():
    orders = [order(seed, epoch, 40).tolist() for seed in range(5) for epoch in range(5)]
    assert len({tuple(rows) for rows in orders}) == 25


def test_the_global_numpy_state_has_no_influence_and_stays():
    np.random.seed(1)  # noqa: NPY002
    first, state = order(0, 0, 40), np.random.get_state()[1].copy()  # noqa: NPY002
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(order(0, 0, 40), first)


def test_the_first_batch_of_a_hundred_million_is_quick_and_small():
    tracemalloc.start()
    start = time.perf_counter()
    batch = order(0, 1, 100_000_000)[:64]
    seconds, peak_bytes = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(batch.tolist())) == 64
    assert seconds < 20  # a busy machine's; all rows in order take more memory than allowed
    assert peak_bytes < 1e6


def test_a_large_order_is_indexed_like_an_array():
    rows = order(0, 0, 20_000_000)
    head = rows[:100]
    assert isinstance(rows, FeistelOrder)
    assert [rows[i] for i in (0, 7, 99)] == head[[0, 7, 99]].tolist()
    assert rows[7:100:13].tolist() == head[7:100:13].tolist()
    assert rows[-1] == rows[19_999_999] == rows[19_999_990:30_000_000][-1]
    with pytest.raises(IndexError):
        rows[20_000_000]


@pytest.mark.parametrize(
    "make", [lambda s: order(s, 0, 20), lambda s: FeistelOrder(400, keys(s))[:20]]
)
def test_every_place_gets_every_part_of_the_data_alike(make):
    # Chi-squared of (place, fifth of the data) over seeds, against its mean and 5 deviations.
    rows = np.array([make(seed) for seed in range(2000)])
    size = 20 if rows.max() < 20 else 400
    counts = np.array([np.bincount(column * 5 // size, minlength=5) for column in rows.T])
    chi2 = ((counts - 400.0) ** 2 / 400).sum()
    degrees = 20 * 4
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)


def test_neighbours_in_a_large_order_are_unrelated():
    rows = order(1, 2, 100_000_000)[:200_000].astype(float)
    for lag in (1, 2, 9_999, 10_000):
        assert abs(np.corrcoef(rows[lag:], rows[:-lag])[0, 1]) < 0.012


def test_a_negative_length_is_refused():
    with pytest.raises(ConfigurationError, match="n=-1"):
        order(0, 0, -1)


def test_more_samples_than_a_position_can_hold_are_refused():
    last = (1 << 62) - 1
    assert 0 <= order(0, 0, last)[last - 1] < last
    for n in (1 << 62, 1 << 63, 1 << 64):
        with pytest.raises(ConfigurationError, match=rf"n={n} samples; n must be below 2\*\*62"):
            order(0, 0, n)
