"""Schedules against PyTorch's, over whole runs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from mlx_fit.errors import ConfigurationError
from mlx_fit.schedules import constant_warmup, warmup_cosine, warmup_linear

DECAYS = [warmup_cosine, warmup_linear]


def rates(schedule, num_steps, start=0):
    return np.array([schedule(step).item() for step in range(start, start + num_steps)])


def torch_rates(peak, num_steps, make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, seen = make(optimizer), []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(seen)


@pytest.mark.parametrize("floor", [0.0, 0.02])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 1), (50, 7), (300, 100)])
def test_the_cosine_is_pytorchs_after_the_warm_up(total, warmup, floor):
    expected = torch_rates(
        0.3,
        total - warmup + 1,
        lambda o: lr_scheduler.CosineAnnealingLR(o, total - warmup, eta_min=floor),
    )
    got = rates(warmup_cosine(0.3, total, warmup, floor), total - warmup + 1, start=warmup)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("floor", [0.0, 0.06])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 1), (50, 7), (300, 100)])
def test_the_line_is_pytorchs_after_the_warm_up(total, warmup, floor):
    expected = torch_rates(
        0.3,
        total - warmup + 1,
        lambda o: lr_scheduler.LinearLR(o, 1.0, floor / 0.3, total_iters=total - warmup),
    )
    got = rates(warmup_linear(0.3, total, warmup, floor), total - warmup + 1, start=warmup)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("warmup", [2, 7, 100])
def test_the_warm_up_is_pytorchs_linear_one(warmup):
    expected = torch_rates(
        0.3, warmup, lambda o: lr_scheduler.LinearLR(o, 1 / warmup, total_iters=warmup - 1)
    )
    for schedule in (*(make(0.3, 200, warmup) for make in DECAYS), constant_warmup(0.3, warmup)):
        np.testing.assert_allclose(rates(schedule, warmup), expected, rtol=1e-6)


@pytest.mark.parametrize("make", DECAYS)
def test_the_peak_and_the_floor_are_exact(make):
    schedule = make(0.3, 100, 10, 0.01)
    assert rates(schedule, 2, start=9).tolist() == [np.float32(0.3)] * 2
    assert rates(schedule, 1, start=11)[0] < np.float32(0.3)
    assert rates(schedule, 1, start=99)[0] > np.float32(0.01)
    assert rates(schedule, 50, start=100).tolist() == [np.float32(0.01)] * 50
    assert schedule(10**9).item() == np.float32(0.01)


@pytest.mark.parametrize("total", [20, 10_000, 3_000_000, 2**33])
@pytest.mark.parametrize("make", DECAYS)
def test_the_rate_is_above_zero_one_step_before_the_end_and_zero_there(make, total):
    schedule = make(1.0, total, 5)
    assert schedule(mx.array(total - 1, mx.uint64)).item() > 0
    assert schedule(mx.array(total, mx.uint64)).item() == 0
    assert schedule(mx.array(total + 1, mx.uint64)).item() == 0


@pytest.mark.parametrize("make", [*DECAYS, lambda peak, _, warmup: constant_warmup(peak, warmup)])
def test_an_optimizer_follows_it_inside_a_compiled_step(make):
    schedule, model = make(0.1, 8, 3), nn.Linear(2, 1)
    optimizer = optim.SGD(schedule)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x):
        _, gradients = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, x)
        optimizer.update(model, gradients)

    step, seen = mx.compile(step, inputs=state, outputs=state), [0.0]
    for _ in range(10):
        before = np.array(model.bias)
        step(mx.ones((1, 2)))
        seen.append((before - np.array(model.bias)).item())
        assert optimizer.learning_rate.dtype == mx.float32
    np.testing.assert_allclose(seen[1:], rates(schedule, 10), atol=1e-6)


def test_a_constant_schedule_stays_at_the_peak():
    assert rates(constant_warmup(0.3, 4), 100, start=3).tolist() == [np.float32(0.3)] * 100
    assert rates(constant_warmup(0.3, 0), 3).tolist() == [np.float32(0.3)] * 3


def test_a_step_may_be_an_int_or_an_array_and_the_rate_is_float32():
    schedule = warmup_cosine(0.3, 50, 7)
    for step in (0, 3, 7, 20, 60):
        for dtype in (mx.int32, mx.uint64, mx.float32):
            assert schedule(mx.array(step, dtype)).item() == schedule(step).item()
        assert schedule(step).dtype == mx.float32
        assert schedule(step).shape == ()


@pytest.mark.parametrize("make", DECAYS)
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0.0, 10, 2), "peak=0"),
        ((-1.0, 10, 2), "peak=-1"),
        ((float("nan"), 10, 2), "peak=nan"),
        ((0.1, 10.5, 2), "total_steps=10.5"),
        ((0.1, 10, -1), "warmup_steps=-1"),
        ((0.1, 10, 0.1), "warmup_steps=0.1"),
        ((0.1, 10, 10), "warmup_steps=10"),
        ((0.1, 0, 0), "total_steps=0"),
        ((0.1, 10, 2, 0.2), "floor=0.2"),
        ((0.1, 10, 2, -0.1), "floor=-0.1"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(make, arguments, name):
    with pytest.raises(ConfigurationError, match=name):
        make(*arguments)


def test_counts_may_be_numpy_integers():
    assert warmup_linear(0.1, np.int64(10), np.int32(2))(5).item() > 0
    with pytest.raises(ConfigurationError, match="warmup_steps=-1"):
        constant_warmup(0.1, -1)
