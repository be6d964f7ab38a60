"""Whole training runs against PyTorch on the CPU, with the same constants, to rounding."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer
from mlx_fit.losses import CrossEntropy
from mlx_fit.schedules import constant_warmup, warmup_cosine, warmup_linear

torch = pytest.importorskip("torch")

NUM_STEPS = 12
OPTIMIZERS = {
    "sgd": (
        lambda: optim.SGD(0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda: optim.SGD(0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "adam": (
        lambda: optim.Adam(0.01, betas=[0.9, 0.99], bias_correction=True),
        lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.99)),
    ),
    "adamw": (
        lambda: optim.AdamW(0.01, weight_decay=0.1, bias_correction=True),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ),
    "rmsprop": (
        lambda: optim.RMSprop(0.003, alpha=0.9, eps=1e-6),
        lambda p: torch.optim.RMSprop(p, 0.003, alpha=0.9, eps=1e-6),
    ),
}
LOSSES = {
    "cross_entropy": torch.nn.functional.cross_entropy,
    "mse": torch.nn.functional.mse_loss,
    "l1": torch.nn.functional.l1_loss,
    "huber": torch.nn.functional.huber_loss,
    "binary_cross_entropy": torch.nn.functional.binary_cross_entropy_with_logits,
}


@pytest.fixture
def pair(rng):
    """The same two-layer network in MLX and in PyTorch."""
    ours = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    copy_weights(ours, theirs)
    return ours, theirs


def copy_weights(ours, theirs):
    for mine, other in zip(ours.layers, theirs, strict=True):
        for name, value in other.named_parameters():
            setattr(mine, name, mx.array(value.detach().numpy()))


def classes(rng, sizes):
    return [
        (rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 4, n).astype(np.int64))
        for n in sizes
    ]


def train_torch(model, optimizer, batches, loss, after_backward=None, schedule=None):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(model(torch.from_numpy(x)), torch.from_numpy(y))
        value.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(value.item())
    return losses


def assert_same_weights(ours, theirs, atol=2e-6):
    for mine, other in zip(ours.layers, theirs, strict=True):
        for name, value in other.named_parameters():
            np.testing.assert_allclose(
                np.array(mine[name]), value.detach().numpy(), rtol=1e-5, atol=atol
            )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_the_same_constants_give_the_same_weights(name, pair, rng):
    ours, theirs = pair
    mine, other = OPTIMIZERS[name]
    batches = classes(rng, [8] * NUM_STEPS)
    losses = train_torch(
        theirs, other(theirs.parameters()), batches, torch.nn.functional.cross_entropy
    )
    history = Trainer(ours, mine(), "cross_entropy").fit(batches, verbose=0, log_every=1)
    # An update of Adam's is near its rate however small the gradient: rounding shows most there.
    assert_same_weights(ours, theirs, atol=1e-5)
    np.testing.assert_allclose([row["loss"] for row in history.steps], losses, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_name_train_as_in_torch(name, pair, rng):
    ours, theirs = pair
    batches = classes(rng, [8, 8, 8, 3])
    if name != "cross_entropy":
        batches = [(x, rng.random(size=(len(x), 4)).astype(np.float32)) for x, _ in batches]
    losses = train_torch(theirs, torch.optim.SGD(theirs.parameters(), 0.1), batches, LOSSES[name])
    history = Trainer(ours, optim.SGD(0.1), name).fit(batches, verbose=0)
    assert_same_weights(ours, theirs)
    expected = np.average(losses, weights=[8, 8, 8, 3])
    assert history.history["loss"] == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"clip_norm": 0.05}, lambda p: torch.nn.utils.clip_grad_norm_(p, 0.05)),
        ({"clip_value": 0.01}, lambda p: torch.nn.utils.clip_grad_value_(p, 0.01)),
    ],
    ids=["norm", "value"],
)
def test_clipping_is_that_of_torch(options, clip, pair, rng):
    ours, theirs = pair
    batches = classes(rng, [8] * 6)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.5, momentum=0.9)
    norms = []
    train_torch(
        theirs,
        optimizer,
        batches,
        torch.nn.functional.cross_entropy,
        after_backward=lambda: norms.append(clip(list(theirs.parameters()))),
    )
    trainer = Trainer(ours, optim.SGD(0.5, momentum=0.9), "cross_entropy", **options)
    history = trainer.fit(batches, verbose=0)
    assert_same_weights(ours, theirs)
    if "clip_norm" in options:  # what is logged is the norm before clipping, as torch returns it
        assert min(norms) > 0.05
        assert history.history["grad_norm"] == pytest.approx([float(np.mean(norms))], rel=1e-5)


WARMUP = 3
SCHEDULES = {
    "cosine": (
        lambda: warmup_cosine(0.2, NUM_STEPS, WARMUP, floor=0.02),
        lambda n: 0.02 + 0.18 * 0.5 * (1 + np.cos(np.pi * (n - WARMUP) / (NUM_STEPS - WARMUP))),
    ),
    "linear": (
        lambda: warmup_linear(0.2, NUM_STEPS, WARMUP, floor=0.02),
        lambda n: 0.2 - 0.18 * (n - WARMUP) / (NUM_STEPS - WARMUP),
    ),
    "constant": (lambda: constant_warmup(0.2, WARMUP), lambda n: 0.2),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_schedules_follow_updates_as_in_torch(name, accumulation, pair, rng):
    ours, theirs = pair
    mine, after = SCHEDULES[name]
    batches = classes(rng, [8] * NUM_STEPS)
    peak = torch.optim.SGD(theirs.parameters(), 1.0)
    rates = [0.2 * (n + 1) / WARMUP if n < WARMUP else after(n) for n in range(NUM_STEPS + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(peak, lambda n: rates[n])
    train_torch(theirs, peak, batches, torch.nn.functional.cross_entropy, schedule=schedule)
    micro = 8 // accumulation
    parts = [(x[i : i + micro], y[i : i + micro]) for x, y in batches for i in range(0, 8, micro)]
    trainer = Trainer(ours, optim.SGD(mine()), "cross_entropy", gradient_accumulation=accumulation)
    history = trainer.fit(parts, verbose=0)
    assert_same_weights(ours, theirs)
    assert history.history["learning_rate"] == pytest.approx([rates[NUM_STEPS - 1]], rel=1e-5)


def test_class_weight_is_the_weight_of_torch_cross_entropy(pair, rng):
    ours, theirs = pair
    batches = classes(rng, [8] * 5)
    weight = [0.5, 1.0, 2.0, 3.0]
    train_torch(
        theirs,
        torch.optim.SGD(theirs.parameters(), 0.2),
        batches,
        torch.nn.CrossEntropyLoss(torch.tensor(weight)),
    )
    trainer = Trainer(ours, optim.SGD(0.2), "cross_entropy")
    trainer.fit(batches, class_weight=dict(enumerate(weight)), verbose=0)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_ignored_labels_count_nowhere_as_in_torch(accumulation, on_device, pair, rng):
    """With accumulation too: torch sees the window as one batch and divides by what counts."""
    ours, theirs = pair
    batches = classes(rng, [8] * 5)
    for _, y in batches:
        y[rng.random(8) < 0.4] = 9
    batches[2][1][:2] = 9  # with micro-batches of two: one where nothing counts
    train_torch(
        theirs,
        torch.optim.SGD(theirs.parameters(), 0.2, momentum=0.9),
        batches,
        torch.nn.CrossEntropyLoss(ignore_index=9),
    )
    size = 8 // accumulation
    parts = [(x[i : i + size], y[i : i + size]) for x, y in batches for i in range(0, 8, size)]
    if on_device:
        parts = [(mx.array(x), mx.array(y)) for x, y in parts]
    trainer = Trainer(
        ours,
        optim.SGD(0.2, momentum=0.9),
        CrossEntropy(ignore_index=9),
        gradient_accumulation=accumulation,
    )
    trainer.fit(parts, verbose=0)
    assert_same_weights(ours, theirs)
    assert trainer.optimizer.step.item() == 5


def test_token_losses_with_ignored_targets_are_those_of_torch(rng):
    """Logits of shape (batch, time, classes): every target that counts weighs the same."""
    ours, theirs = nn.Sequential(nn.Linear(6, 4)), torch.nn.Sequential(torch.nn.Linear(6, 4))
    copy_weights(ours, theirs)
    x = rng.normal(size=(4, 7, 6)).astype(np.float32)
    y = rng.integers(0, 4, (4, 7))
    y[0, 1:], y[2] = -100, -100
    loss = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.5)
    losses = train_torch(
        theirs, optimizer, [(x, y)] * 3, lambda z, t: loss(z.reshape(-1, 4), t.reshape(-1))
    )
    history = Trainer(ours, optim.SGD(0.5), "cross_entropy").fit([(x, y)] * 3, verbose=0)
    assert_same_weights(ours, theirs)
    assert history.history["loss"] == pytest.approx([np.mean(losses)], rel=1e-6)


def test_batch_norm_keeps_the_running_statistics_of_torch(rng):
    """Both normalise by the biased variance and store the unbiased one."""
    ours = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm(5), nn.Linear(5, 4))
    theirs = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4)
    )
    copy_weights(ours, theirs)
    batches = classes(rng, [8, 8, 8, 5])
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    train_torch(theirs, optimizer, batches, torch.nn.functional.cross_entropy)
    Trainer(ours, optim.SGD(0.1), "cross_entropy").fit(batches, verbose=0)
    assert_same_weights(ours, theirs)
    mine, other = ours.layers[1], theirs[1]
    np.testing.assert_allclose(
        np.array(mine.running_mean), other.running_mean.numpy(), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(np.array(mine.running_var), other.running_var.numpy(), rtol=1e-5)


def test_evaluation_agrees_with_torch_in_evaluation_mode(pair, rng):
    ours, theirs = pair
    ours.layers.append(nn.Dropout(0.5))
    (x, y), weights = classes(rng, [21])[0], rng.random(21).astype(np.float32)
    logits = theirs(torch.from_numpy(x)).detach()
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y), reduction="none")
    right = (logits.argmax(-1).numpy() == y).astype(np.float64)
    found = Trainer(ours, loss="cross_entropy", metrics=["accuracy"], batch_size=8).evaluate(
        (x, y, weights), verbose=0
    )
    assert found["loss"] == pytest.approx(np.average(losses.numpy(), weights=weights), rel=1e-6)
    assert found["accuracy"] == pytest.approx(np.average(right, weights=weights), rel=1e-6)
