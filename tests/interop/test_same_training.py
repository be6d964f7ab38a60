"""Trainer.fit follows PyTorch's own loop, with the same data, weights and constants, for 200 steps.

The widest difference of any loss is 1e-4.
"""

from __future__ import annotations

import math

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer
from mlx_fit.errors import ConfigurationError
from mlx_fit.interop.torch import compare, load_weights, optimizers
from mlx_fit.schedules import warmup_cosine

torch = pytest.importorskip("torch")
tnn = torch.nn

NUM_STEPS = 200


@pytest.fixture
def batches(rng):
    """Three classes, not quite separable."""
    centres = rng.normal(size=(3, 6))
    labels = rng.integers(0, 3, size=(NUM_STEPS, 16))
    noise = rng.normal(size=(NUM_STEPS, 16, 6))
    return list(zip((centres[labels] + noise).astype(np.float32), labels, strict=True))


def pair(has_norm=False):
    torch.manual_seed(0)
    norm = [tnn.BatchNorm1d(16)] if has_norm else []
    theirs = tnn.Sequential(tnn.Linear(6, 16), *norm, tnn.Tanh(), tnn.Linear(16, 3))
    norms = [nn.BatchNorm(16)] if has_norm else []
    ours = nn.Sequential(nn.Linear(6, 16), *norms, nn.Tanh(), nn.Linear(16, 3))
    load_weights(ours, theirs)
    return theirs, ours


def torch_losses(model, optimizer, batches, clip=None, schedule=None, accumulation=1):
    losses = []
    for number, (x, y) in enumerate(batches, 1):
        loss = tnn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        (loss / accumulation).backward()
        losses.append(loss.item())
        if number % accumulation == 0:
            if clip is not None:
                tnn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
    return losses


def our_losses(model, optimizer, batches, **options):
    history = Trainer(model, optimizer, "cross_entropy", **options).fit(
        batches, verbose=0, log_every=1
    )
    return [row["loss"] for row in history.steps]


def assert_follows(got, expected):
    assert len(got) == len(expected)
    assert expected[-1] < 0.8 * expected[0]  # it has learnt something to follow
    assert np.abs(np.array(got) - expected).max() < 1e-4


OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "SGD, decayed": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "SGD, dampened": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3},
    "SGD, plain": {"lr": 0.1},
    "Adam": {"lr": 3e-3},
    "Adam, decayed": {"lr": 3e-3, "weight_decay": 0.01, "betas": (0.8, 0.99)},
    "Adam, amsgrad": {"lr": 3e-3, "amsgrad": True},
    "AdamW": {"lr": 3e-3},
    "AdamW, decayed": {"lr": 3e-3, "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-3, "eps": 1e-6},
    "RMSprop, decayed": {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-6},
    "RMSprop, centered": {"lr": 1e-3, "centered": True, "momentum": 0.5, "eps": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_pytorchs_names_follows_it(name, batches):
    theirs, ours = pair()
    kind = name.partition(",")[0]
    optimizer = getattr(torch.optim, kind)(theirs.parameters(), **OPTIMIZERS[name])
    expected = torch_losses(theirs, optimizer, batches)
    assert_follows(
        our_losses(ours, getattr(optimizers, kind)(**OPTIMIZERS[name]), batches), expected
    )


MLX_OWN = {
    "SGD": (optim.SGD(0.05, momentum=0.9), {"lr": 0.05, "momentum": 0.9}),
    "Adam": (optim.Adam(3e-3, bias_correction=True), {"lr": 3e-3}),
    "AdamW": (optim.AdamW(3e-3, bias_correction=True), {"lr": 3e-3}),
    "RMSprop": (optim.RMSprop(1e-3, eps=1e-6), {"lr": 1e-3, "eps": 1e-6}),
}


@pytest.mark.parametrize("name", MLX_OWN)
def test_mlxs_own_optimizers_follow_with_the_same_constants(name, batches):
    theirs, ours = pair()
    own, options = MLX_OWN[name]
    expected = torch_losses(
        theirs, getattr(torch.optim, name)(theirs.parameters(), **options), batches
    )
    assert_follows(our_losses(ours, own, batches), expected)


def test_mlxs_defaults_part_from_it_and_the_checker_says_so(batches):
    theirs, ours = pair()
    optimizer = torch.optim.Adam(theirs.parameters(), 3e-3)
    found = compare(theirs, ours, batches[0][0], optimizers=(optimizer, optim.Adam(3e-3)))
    assert "bias correction" in found.notes[0]
    expected = torch_losses(theirs, optimizer, batches)
    got = our_losses(ours, optim.Adam(3e-3), batches)
    assert np.abs(np.array(got) - expected).max() > 1e-3


def test_batch_norm_follows(batches):
    theirs, ours = pair(has_norm=True)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9)
    expected = torch_losses(theirs, optimizer, batches)
    assert_follows(our_losses(ours, optimizers.SGD(0.05, 0.9), batches), expected)
    assert compare(theirs, ours, batches[0][0], atol=1e-3).agrees  # the running statistics too


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_clipping_warm_up_cosine_and_accumulation_together_follow(kind, batches):
    accumulation, warmup = 2, 10
    total = NUM_STEPS // accumulation
    peak = {"SGD": 0.1, "Adam": 5e-3, "AdamW": 5e-3, "RMSprop": 2e-3}[kind]
    options = {"momentum": 0.9} if kind == "SGD" else {"eps": 1e-6}
    theirs, ours = pair(has_norm=True)
    optimizer = getattr(torch.optim, kind)(
        theirs.parameters(), lr=peak, weight_decay=0.01, **options
    )

    def factor(update):
        if update < warmup:
            return (update + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    expected = torch_losses(theirs, optimizer, batches, 0.5, schedule, accumulation)
    own = getattr(optimizers, kind)(
        lr=warmup_cosine(peak, total, warmup), weight_decay=0.01, **options
    )
    got = our_losses(ours, own, batches, clip_norm=0.5, gradient_accumulation=accumulation)
    # A row of the history is that of an update: the mean of its batches.
    assert_follows(got, np.reshape(expected, (total, accumulation)).mean(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.SGD(-1), "lr=-1"),
        (lambda: optimizers.SGD(0.1, nesterov=True), "nesterov"),
        (lambda: optimizers.Adam(betas=(0.9,)), "betas"),
        (lambda: optimizers.AdamW(weight_decay=-1), "weight_decay=-1"),
        (lambda: optimizers.RMSprop(alpha=2), "alpha=2"),
    ],
)
def test_arguments_of_optimizers_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_parameters_given_first_as_in_pytorch_are_told(kind):
    make = getattr(optimizers, kind)
    model = nn.Linear(2, 2)
    calls = [
        lambda: make(model.parameters(), lr=0.1),
        lambda: make(model.parameters()),
        lambda: make(tnn.Linear(2, 2).parameters(), 0.1),
        lambda: make(params=[model.weight], lr=0.1),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=rf"^{kind} got parameters.*param_groups"):
            call()
