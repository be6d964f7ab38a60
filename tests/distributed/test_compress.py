"""Compressed sums of gradients on two real processes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from ranks import run_cases

from mlx_fit import DistributedTrainer, SyncPolicy
from mlx_fit.distributed import DiLoCo
from mlx_fit.distributed.compress import PowerSGD, _dequantized, quantized
from mlx_fit.errors import ConfigurationError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = ["compression", "compressed_runs"]
    return run_cases(2, names, tmp_path_factory.mktemp("compress"))


def test_int8_sends_a_quarter_of_the_bytes(two):
    num_elements = 40 * 30 + 9 + 4
    assert two["compression"][0]["int8"]["bytes"] <= 0.26 * 4 * num_elements


def test_what_int8_loses_in_one_update_is_made_up(two):
    found = two["compression"][0]["int8"]
    # A quantum a rank: the largest size in the block, of all arrays here, over 127.
    quantum = found["size"]["w"] * 2 / 127
    for key in ("w", "b", "k"):
        assert 0 < found["last"][key] <= quantum


def test_powersgd_sends_thin_matrices_and_small_ones_whole(two):
    found = two["compression"][0]["powersgd:2"]
    assert found["bytes"] == 4 * (2 * (40 + 30) + 9 + 4)
    assert max(found["last"]["b"], found["last"]["k"]) < 1e-5  # of the test's own float64


def test_what_powersgd_loses_stays_bounded(two):
    found = two["compression"][0]["powersgd:2"]
    assert found["last"]["w"] < 15 * found["first"]["w"]  # without feedback: 50 times or more


def test_ranks_agree_on_compressed_sums_to_the_bit(two):
    assert two["compression"][0] == two["compression"][1]
    assert two["compressed_runs"][0] == two["compressed_runs"][1]


@pytest.mark.parametrize("name", ["int8", "powersgd:2"])
def test_a_compressed_run_learns_nearly_the_same(two, name):
    runs = two["compressed_runs"][0]
    exact, found = runs["None"]["history"]["loss"], runs[name]["history"]["loss"]
    assert found != exact
    np.testing.assert_allclose(found, exact, atol=5e-3)


@pytest.mark.parametrize("name", ["int8", "powersgd:2"])
def test_a_compressed_run_goes_on_to_the_bit(two, name):
    runs = two["compressed_runs"][0]
    assert runs[f"{name} resumed"]["weights"] == runs[name]["weights"]


def test_no_element_is_off_by_more_than_half_a_scale():
    values = np.random.default_rng(0).normal(size=3000).astype(np.float32) * 1e3
    values[1024:2048] = 0
    codes, scales = quantized(mx.array(values))
    found = np.array(_dequantized(codes.view(mx.uint8), scales.view(mx.uint8)))
    error = np.abs(found - values)
    assert (error <= np.repeat(np.array(scales), 1024)[:3000] * 0.5001).all()
    assert scales.shape == (3,)
    assert not found[1024:2048].any()


class OneRank:
    """A group in which nobody else is."""

    rank, size = 0, 1

    def sum(self, arrays, phase=""):
        return arrays


def test_powersgd_is_exact_for_matrices_of_its_rank():
    rng = np.random.default_rng(0)
    matrix = mx.array(rng.normal(size=(20, 2)) @ rng.normal(size=(2, 30)), mx.float32)
    found = PowerSGD(2).sum(OneRank(), {"w": matrix})["w"]
    np.testing.assert_allclose(np.array(found), np.array(matrix), atol=1e-5)


def test_a_saved_residual_of_other_ranks_is_left_out_with_a_warning():
    compressor = PowerSGD(1)
    state = {"residuals": [{"w": np.ones((3, 4))}, {"w": np.ones((3, 4))}], "shared": {}}
    with pytest.warns(UserWarning, match="made by 2 ranks, and there are 1 now"):
        compressor.load_state_dict(state, OneRank())


@pytest.mark.parametrize("name", ["int4", "powersgd", "powersgd:0", "powersgd:x", 8])
def test_unknown_compression_is_refused(name):
    with pytest.raises(ConfigurationError, match="compress="):
        SyncPolicy(compress=name)


def test_two_ways_of_sending_less_are_refused():
    with pytest.raises(ConfigurationError, match="reduce_dtype"):
        SyncPolicy(compress="int8", reduce_dtype="bfloat16")


@pytest.mark.parametrize("name", ["reduce_dtype", "compress", "check_every"])
def test_options_that_local_strategies_would_ignore_are_refused(name):
    from rank_cases import mlp, optim

    value = {"reduce_dtype": "bfloat16", "compress": "int8", "check_every": 5}[name]
    sync = SyncPolicy(**{name: value})
    with pytest.raises(ConfigurationError, match=f"{name}=.* does nothing"):
        DistributedTrainer(mlp(), optim.SGD(0.1), "mse", strategy=DiLoCo(4), sync=sync)
