"""Faster ranks read more rows of a batch; results stay the same."""

import numpy as np
import pytest
import rank_cases
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_cases

from mlx_fit import ConfigurationError, DistributedTrainer
from mlx_fit.data.shares import share, sizes_by_rate


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_cases(2, ["balanced", "balanced_own_data"], tmp_path_factory.mktemp("balance"))


@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_no_other_shares_are_done_earlier(num_rows, rates):
    """Against trying all of them."""
    sizes = sizes_by_rate(num_rows, tuple(map(float, rates)))
    assert sum(sizes) == num_rows
    if num_rows < len(rates):
        assert set(sizes) <= {0, 1}
        return
    assert min(sizes) >= 1

    def best(left, others):
        """The least time in which the others can read what is left, a row each at least."""
        if len(others) == 1:
            return left / others[0]
        most = left - len(others) + 1
        return min(max(n / others[0], best(left - n, others[1:])) for n in range(1, most + 1))

    if len(rates) < 4:
        found = max(size / rate for size, rate in zip(sizes, rates, strict=True))
        assert found == pytest.approx(best(num_rows, rates))


@pytest.mark.parametrize(
    ("num_rows", "rates", "sizes"),
    [
        (32, (300, 100), (24, 8)),
        (10, (3, 1), (8, 2)),
        (12, (1, 1, 1), (4, 4, 4)),
        (5, (99, 1), (4, 1)),
    ],
)
def test_shares_follow_the_rates_and_each_rank_keeps_a_row(num_rows, rates, sizes):
    assert sizes_by_rate(num_rows, tuple(map(float, rates))) == sizes
    parts = [list(share(range(num_rows), len(rates), r, rates)) for r in range(len(rates))]
    assert [row for part in parts for row in part] == list(range(num_rows))


def test_a_rank_of_a_third_of_the_speed_gets_about_a_quarter_of_the_rows(two):
    first, second = two["balanced"]
    assert first["sizes"][:3] == second["sizes"][:3] == [16, 16, 16]  # nothing is known yet
    assert second["sizes"][-3:] == pytest.approx([8] * 3, abs=2)
    assert [a + b for a, b in zip(first["sizes"], second["sizes"], strict=True)] == [32] * 9
    assert first["rates"] == second["rates"]


def test_what_is_read_ahead_does_not_look_faster_than_it_is(two):
    first, second = two["balanced"]
    assert second["sizes_ahead"][-3:] == pytest.approx([8] * 3, abs=3)
    assert sum(first["sizes_ahead"]) + sum(second["sizes_ahead"]) == 5 * 96


def test_results_do_not_depend_on_the_shares(two, tmp_path):
    expected = rank_cases.CASES["balanced"](tmp_path)  # in one process
    for found in two["balanced"]:
        for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
            np.testing.assert_allclose(found["history"][key], expected["history"][key], atol=1e-5)


def test_balance_needs_data_that_the_trainer_splits(two):
    assert all("batches of its own" in text for text in two["balanced_own_data"])
    with pytest.raises(ConfigurationError, match="balance='yes'"):
        DistributedTrainer(rank_cases.mlp(), balance="yes")
