import json

import numpy as np
import pytest
import torch

from mlx_fit.data import (
    DataLoader,
    RowGroupSampler,
    StratifiedSampler,
    WeightedRandomSampler,
    order,
)
from mlx_fit.data.order import uniform
from mlx_fit.errors import ConfigurationError

WEIGHTS = [0.0, 1.0, 2.0, 5.0]


def rows(loader):
    return [batch.tolist() for batch in loader]


def test_uniform_numbers_are_uniform_and_follow_seed_and_epoch():
    values = uniform(0, 0, 100_000)
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert counts.sum() == 100_000
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000)
    assert not np.array_equal(uniform(0, 1, 10), uniform(1, 0, 10))
    np.testing.assert_array_equal(uniform(0, 0, 10), values[:10])
    assert np.argsort(values).tolist() != order(0, 0, 100_000).tolist()  # from other words


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_rows_are_drawn_in_proportion_to_their_weights(make):
    sampler = WeightedRandomSampler(make(WEIGHTS), 80_000)
    counts = np.bincount(list(sampler), minlength=4)
    assert counts[0] == 0
    np.testing.assert_allclose(counts, [0, 10_000, 20_000, 50_000], atol=700)
    assert len(sampler) == 80_000


def test_without_replacement_first_draws_follow_the_weights_and_no_row_comes_twice():
    sampler = WeightedRandomSampler(WEIGHTS, 3, replacement=False)
    firsts, pairs = np.zeros(4), set()
    for epoch in range(4000):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert sorted(drawn) == [1, 2, 3]
        firsts[drawn[0]] += 1
        pairs.add(tuple(drawn))
    np.testing.assert_allclose(firsts / 4000, np.array(WEIGHTS) / 8, atol=0.03)
    assert len(pairs) == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedRandomSampler(np.arange(1, 31), seed=3),
        lambda: WeightedRandomSampler(np.arange(1, 31), 12, replacement=False, seed=3),
        lambda: StratifiedSampler(np.arange(30) % 4, seed=3),
    ],
)
def test_samplers_resume_exactly_and_change_with_the_epoch(make):
    whole = DataLoader(range(30), 4, sampler=make())
    epochs = [rows(whole) for _ in range(3)]
    assert epochs[0] != epochs[1]
    stopped = DataLoader(range(30), 4, sampler=make())
    list(stopped)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    resumed = DataLoader(range(30), 4, sampler=make())
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert rows(resumed) == epochs[1][2:]
    assert rows(resumed) == epochs[2]


@pytest.mark.parametrize("num_rows", [[30, 10], [97, 2, 1], [5, 5, 5, 5]])
def test_strata_are_spread_over_the_epoch_and_each_row_comes_once(num_rows):
    labels = np.repeat([f"class {i}" for i in range(len(num_rows))], num_rows)
    sampler = StratifiedSampler(labels, seed=1)
    visited = np.array(list(sampler))
    assert sorted(visited) == list(range(len(labels)))
    for start in range(0, len(labels), 8):
        window = labels[visited[start : start + 8]]
        for name, share in zip(np.unique(labels), num_rows, strict=True):
            expected = len(window) * share / len(labels)
            assert abs((window == name).sum() - expected) <= 2


def test_strata_are_shuffled_inside():
    sampler = StratifiedSampler([0] * 20, seed=1)
    assert list(sampler) == order(1, 0, 20).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedRandomSampler([]), "at least one above 0"),
        (lambda: WeightedRandomSampler([0, 0]), "at least one above 0"),
        (lambda: WeightedRandomSampler([1, -1]), ">= 0"),
        (lambda: WeightedRandomSampler([1, np.nan]), "finite"),
        (lambda: WeightedRandomSampler([[1, 2]]), r"shape \(1, 2\)"),
        (lambda: WeightedRandomSampler(["a"]), "cannot be made numbers"),
        (lambda: WeightedRandomSampler([1], 0), "num_samples=0"),
        (lambda: WeightedRandomSampler([1, 0], 2, False), "only 1 of 2 weights"),
        (lambda: WeightedRandomSampler([1], replacement=1), "replacement=1"),
        (lambda: StratifiedSampler([[1]]), r"shape \(1, 1\)"),
        (lambda: StratifiedSampler([]), r"shape \(0,\)"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_row_groups_are_mixed_a_few_at_a_time_and_each_row_comes_once():
    sizes = [5, 0, 7, 3, 6, 4]
    group_of = np.repeat(np.arange(6), sizes)
    sampler = RowGroupSampler(sizes, 2, seed=4)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(len(sampler)))
        groups = group_of[epochs[-1]]
        spans = [np.flatnonzero(groups == group) for group in set(groups.tolist())]
        for place in range(len(groups)):
            assert sum(span[0] <= place <= span[-1] for span in spans) <= 2
    assert epochs[0] == epochs[2] != epochs[1]
    assert list(RowGroupSampler(sizes, 2, seed=5)) != epochs[0]


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1], [1.5]])
def test_row_groups_need_sizes(sizes):
    with pytest.raises(ConfigurationError, match="group_sizes"):
        RowGroupSampler(sizes)
