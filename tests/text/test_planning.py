"""Widths and batches, against a search of all possibilities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fit.text.planning import best_widths, bucketed, choose_grid, padding, size


def cost(lengths, widths):
    return sum(min(width for width in widths if width >= length) for length in lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 5))
def test_no_other_widths_pad_less(lengths, count):
    different = sorted(set(lengths))
    found = best_widths(np.array(lengths), count)
    assert [len(widths) for widths in found] == list(range(1, min(count, len(different)) + 1))
    for widths in found:
        assert widths.tolist() == sorted(set(widths.tolist()))
        others = itertools.combinations(different[:-1], len(widths) - 1)
        assert cost(lengths, widths) == min(cost(lengths, [*o, different[-1]]) for o in others)


def test_many_different_lengths_are_no_trouble(rng):
    lengths = rng.integers(1, 100_000, 20_000)
    widths = best_widths(lengths, 31)[-1]
    positions = widths[np.searchsorted(widths, lengths)].sum()
    assert widths[-1] == lengths.max()
    assert 1 - lengths.sum() / positions < 0.035, "31 equal steps would pad 3.2 %"


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(2, 8),
    st.randoms(use_true_random=False),
)
def test_every_row_is_in_one_batch_that_holds_it_in_few_shapes(lengths, batch_size, most, random):
    lengths = np.array(lengths)
    grid, shapes = choose_grid(lengths, batch_size, most), set()
    for _ in range(3):
        order = np.array(random.sample(range(len(lengths)), len(lengths)))
        batches = bucketed(lengths, order, grid, batch_size)
        assert sorted(np.concatenate(batches.rows).tolist()) == list(range(len(lengths)))
        for rows, width in zip(batches.rows, batches.widths, strict=True):
            assert lengths[rows].max() <= width
            shapes.add((len(rows), width))
    assert len(shapes) <= most
    assert sum(len(rows) < batch_size for rows in batches.rows) <= 1


def test_30000_lognormal_rows_are_padded_by_less_than_9_percent(rng):
    for count in (30_000, 30_001):
        lengths = np.clip(rng.lognormal(5, 1, count), 2, 4096).astype(int)
        grid = choose_grid(lengths, 32, 32)
        batches = bucketed(lengths, rng.permutation(count), grid, 32)
        assert padding(lengths, batches) < 0.08
        shapes = [(len(rows), width) for rows, width in zip(*batches, strict=True)]
        assert size(batches) == sum(rows * width for rows, width in shapes)
        assert len(set(shapes)) <= 32


@pytest.mark.parametrize("long_first", [True, False])
def test_a_short_batch_is_where_it_pads_less(long_first):
    lengths = np.array([50, 3, 3] if long_first else [50, 50, 3])
    batches = bucketed(lengths, np.arange(3), choose_grid(lengths, 2, 32), 2)
    assert padding(lengths, batches) == 0
