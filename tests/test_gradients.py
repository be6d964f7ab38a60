"""Arithmetic on gradients against NumPy in float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_fit import gradients as grad

SHAPES = [
    (8_000_000,),
    (8_000_000, 1),
    (1, 8_000_000),
    (2828, 2829),
    (1_000_000, 8),
    (8, 1_000_000),
    (9, 3, 3, 7),
]


def tree(rng):
    return {
        "a": mx.array(rng.normal(size=(3, 4)), mx.float32),
        "layers": [{"b": mx.array(rng.normal(size=5), mx.float32)}, {}],
    }


def norm_of(gradients):
    arrays = [gradients["a"], gradients["layers"][0]["b"]]
    return np.sqrt(sum((np.array(a).astype(np.float64) ** 2).sum() for a in arrays))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_of_many_small_values_is_right_whatever_the_shape(shape):
    """One plain CPU sum over 8 million of them is 1 % off."""
    gradient = mx.random.uniform(0, 1e-3, shape, key=mx.random.key(0))
    expected = np.sqrt((np.array(gradient).astype(np.float64) ** 2).sum())
    assert grad.global_norm({"w": gradient}).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("size", [1, 2, 4095, 4096, 4097, 4099, 65537])
def test_the_norm_counts_every_value(size):
    gradient = mx.ones((size,))
    assert grad.global_norm([gradient]).item() == pytest.approx(np.sqrt(size), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_norm_is_the_same_transposed_and_its_bits_do_not_depend_on_memory(shape):
    gradient = mx.random.normal(shape, key=mx.random.key(0))
    moved = mx.contiguous(gradient.T).T
    one, other = (grad.global_norm({"w": g}, {"w"}).item() for g in (gradient, moved))
    assert one == other == pytest.approx(grad.global_norm({"w": gradient}).item(), rel=2e-6)


def test_the_weights_of_linear_layers_are_found_wherever_they_are():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))
    assert grad.linear_weights(model) == {"layers.1.weight", "layers.2.layers.0.weight"}
    assert grad.linear_weights(nn.Linear(2, 2)) == {"weight"}


def test_the_norm_is_taken_over_all_gradients_in_float32(rng):
    gradients = tree(rng)
    assert grad.global_norm(gradients).item() == pytest.approx(norm_of(gradients), rel=1e-6)
    halves = {"w": mx.full((100,), 300.0, mx.float16)}  # squares overflow float16
    assert grad.global_norm(halves).item() == pytest.approx(3000.0)
    assert grad.global_norm({}).item() == 0


@pytest.mark.parametrize("number", [float, np.float64, np.float32, int])
def test_clipping_by_norm_scales_all_gradients_alike(number, rng):
    gradients = tree(rng)
    norm = grad.global_norm(gradients)
    clipped = mx.compile(lambda g, n: grad.clip_by_norm(g, n, number(1)))(gradients, norm)
    assert norm_of(clipped) == pytest.approx(1.0, rel=1e-6)
    expected = np.array(gradients["a"]) / norm_of(gradients)
    np.testing.assert_allclose(np.array(clipped["a"]), expected, rtol=1e-6)


def test_gradients_within_the_limit_keep_their_bits(rng):
    gradients = tree(rng)
    clipped = grad.clip_by_norm(gradients, grad.global_norm(gradients), 1e3)
    np.testing.assert_array_equal(np.array(clipped["a"]), np.array(gradients["a"]))


def test_zero_gradients_stay_zero():
    zeros = {"w": mx.zeros((3,))}
    clipped = grad.clip_by_norm(zeros, grad.global_norm(zeros), 1.0)
    np.testing.assert_array_equal(np.array(clipped["w"]), np.zeros(3))


def test_clipping_keeps_the_dtype():
    gradients = {"w": mx.full((4,), 8.0, mx.bfloat16)}
    assert grad.clip_by_norm(gradients, mx.array(16.0), 1.0)["w"].dtype == mx.bfloat16
    assert grad.clip_by_value(gradients, 1.0)["w"].dtype == mx.bfloat16


def test_clipping_by_value_is_that_of_numpy(rng):
    gradients = tree(rng)
    clipped = grad.clip_by_value(gradients, 0.3)
    expected = np.array(gradients["a"]).clip(-0.3, 0.3)
    np.testing.assert_array_equal(np.array(clipped["a"]), expected)


def test_weighing_is_done_in_float32():
    weighed = grad.weigh({"w": mx.array([60000.0], mx.float16)}, mx.array(1000.0))
    assert weighed["w"].dtype == mx.float32
    assert weighed["w"].item() == pytest.approx(6e7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(value, rng):
    gradients = tree(rng)
    assert grad.all_finite(gradients).item()
    gradients["layers"][0]["b"][3] = value
    assert not grad.all_finite(gradients).item()
