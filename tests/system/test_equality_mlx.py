"""The trainer against a hand-written compiled MLX loop, bit for bit."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_fit import Trainer

OPTIMIZERS = {
    "sgd": lambda: optim.SGD(0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda: optim.AdamW(3e-3, weight_decay=0.1),
    "adam on a schedule": lambda: optim.Adam(optim.cosine_decay(1e-2, 20)),
}


class Net(nn.Module):
    """Dropout and BatchNorm, so that the random key and running statistics matter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.norm = nn.BatchNorm(16)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)

    def __call__(self, x):
        return self.last(self.dropout(nn.relu(self.norm(self.first(x)))))


def make_batches(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, 3, n).astype(np.int32))
        for n in sizes
    ]


def make_net():
    mx.random.seed(3)
    model = Net()
    mx.eval(model.parameters())
    return model


def mean_loss(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def hand_loop(model, optimizer, batches, epochs):
    """What one writes without a library: (weighted mean loss of each epoch)."""
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x, y):
        loss, gradients = nn.value_and_grad(model, mean_loss)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    model.train()
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x, y in batches:
            loss = step(mx.array(x), mx.array(y))
            mx.eval(state, loss)
            total += loss.item() * len(x)
        losses.append(total / sum(len(x) for x, _ in batches))
    return losses


def hand_loop_accumulating(model, optimizer, batches, epochs, count):
    """The same with windows: sum of weight * mean gradient in float32, divided once."""
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def accumulate(x, y, window):
        _, gradients = nn.value_and_grad(model, mean_loss)(model, x, y)
        weighted = tree_map(lambda g: g * len(x), gradients)
        return tree_map(mx.add, window, weighted) if window else weighted

    @partial(mx.compile, inputs=state, outputs=state)
    def update(window, weight):
        optimizer.update(model, tree_map(lambda g: g / weight, window))

    model.train()
    for _ in range(epochs):
        for start in range(0, len(batches), count):
            window, weight = {}, 0.0
            for x, y in batches[start : start + count]:
                window = accumulate(mx.array(x), mx.array(y), window)
                weight += len(x)
            update(window, mx.array(weight))
            mx.eval(state)


def assert_same_bits(one, other):
    ones, others = dict(tree_flatten(one)), dict(tree_flatten(other))
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        np.testing.assert_array_equal(np.array(value), np.array(others[name]), err_msg=name)


def assert_same_run(trainer, model, optimizer):
    assert_same_bits(trainer.model.parameters(), model.parameters())
    assert_same_bits(trainer.optimizer.state, optimizer.state)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_is_the_hand_written_loop_bit_for_bit(name, compile):
    batches = make_batches([8, 8, 8, 6])  # the last one is ragged
    model, optimizer = make_net(), OPTIMIZERS[name]()
    mx.random.seed(7)
    losses = hand_loop(model, optimizer, batches, epochs=4)

    trainer = Trainer(make_net(), OPTIMIZERS[name](), "cross_entropy", compile=compile)
    mx.random.seed(7)
    history = trainer.fit(batches, epochs=4, verbose=0)
    assert_same_run(trainer, model, optimizer)
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-7)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_is_the_hand_written_loop_bit_for_bit(name, compile):
    batches = make_batches([8, 8, 8, 8, 8, 6])  # windows of four and of two, the last batch ragged
    model, optimizer = make_net(), OPTIMIZERS[name]()
    mx.random.seed(7)
    hand_loop_accumulating(model, optimizer, batches, epochs=3, count=4)

    trainer = Trainer(
        make_net(), OPTIMIZERS[name](), "cross_entropy", gradient_accumulation=4, compile=compile
    )
    mx.random.seed(7)
    trainer.fit(batches, epochs=3, verbose=0)
    assert_same_run(trainer, model, optimizer)
    assert trainer.step == trainer.optimizer.step.item() == 6


def test_validation_and_callbacks_change_no_bit_of_training():
    batches = make_batches([8, 8, 6])
    model, optimizer = make_net(), OPTIMIZERS["adamw"]()
    mx.random.seed(7)
    hand_loop(model, optimizer, batches, epochs=3)

    trainer = Trainer(make_net(), OPTIMIZERS["adamw"](), "cross_entropy", ["accuracy"])
    mx.random.seed(7)
    val = make_batches([8, 3], seed=1)
    trainer.fit(batches, {"near": val, "far": val}, epochs=3, validation_freq="2 steps", verbose=0)
    assert_same_run(trainer, model, optimizer)


def test_train_on_batch_is_the_hand_written_loop_bit_for_bit():
    batches = make_batches([8, 8, 6])
    model, optimizer = make_net(), OPTIMIZERS["sgd"]()
    mx.random.seed(7)
    hand_loop(model, optimizer, batches, epochs=1)

    trainer = Trainer(make_net(), OPTIMIZERS["sgd"](), "cross_entropy")
    mx.random.seed(7)
    for x, y in batches:
        trainer.train_on_batch(x, y)
    assert_same_run(trainer, model, optimizer)


def test_a_mask_that_ignores_nothing_changes_no_bit():
    """Labels on the device: the step cannot know that all of them count, and compiles a mask."""
    batches = make_batches([8, 7, 5, 3])
    model, optimizer = make_net(), OPTIMIZERS["sgd"]()
    mx.random.seed(7)
    hand_loop(model, optimizer, batches, epochs=2)

    trainer = Trainer(make_net(), OPTIMIZERS["sgd"](), "cross_entropy")
    mx.random.seed(7)
    trainer.fit([(mx.array(x), mx.array(y)) for x, y in batches], epochs=2, verbose=0)
    assert_same_run(trainer, model, optimizer)


@pytest.mark.parametrize("size", [1, 7, 10, 33, 1000])
def test_the_loss_is_that_of_mx_mean_to_the_bit(size, rng):
    """Dividing by n instead of multiplying by 1 / n differs in a fifth of all draws at n = 10."""
    x, y = rng.normal(size=(20, size, 4)).astype(np.float32), rng.normal(size=(20, size, 1))
    model = nn.Linear(4, 1)
    trainer = Trainer(model, loss="mse")
    for inputs, targets in zip(x, y.astype(np.float32), strict=True):
        expected = nn.losses.mse_loss(model(mx.array(inputs)), mx.array(targets)).item()
        # The log divides sum by weight, so the mean comes back to float32's rounding of a product.
        found = trainer.test_on_batch(inputs, targets)["loss"]
        assert found == pytest.approx(expected, rel=1.3e-7)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_compiled_and_eager_agree_to_the_bit_in_mixed_precision(precision):
    runs = []
    for compile in (True, False):
        trainer = Trainer(
            make_net(), OPTIMIZERS["adamw"](), "cross_entropy", precision=precision, compile=compile
        )
        mx.random.seed(7)
        trainer.fit(make_batches([8, 8, 6]), epochs=3, verbose=0)
        runs.append(trainer)
    assert_same_run(runs[0], runs[1].model, runs[1].optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.1},
        {"clip_value": 0.01},
        {"nonfinite": "skip"},
        {"gradient_accumulation": 2, "clip_norm": 0.1, "nonfinite": "skip"},
    ],
    ids=str,
)
def test_compiled_and_eager_agree_to_the_bit_with(options):
    runs = []
    for compile in (True, False):
        trainer = Trainer(
            make_net(), OPTIMIZERS["sgd"](), "cross_entropy", compile=compile, **options
        )
        mx.random.seed(7)
        history = trainer.fit(make_batches([8, 8, 6]), epochs=3, verbose=0)
        runs.append((trainer, history.history))
    assert_same_run(runs[0][0], runs[1][0].model, runs[1][0].optimizer)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_skip_without_a_bad_batch_changes_no_bit(accumulation):
    runs = []
    for policy in ("ignore", "skip", "raise"):
        trainer = Trainer(
            make_net(),
            OPTIMIZERS["adamw"](),
            "cross_entropy",
            gradient_accumulation=accumulation,
            nonfinite=policy,
        )
        mx.random.seed(7)
        trainer.fit(make_batches([8, 8, 8, 6]), epochs=2, verbose=0)
        runs.append(trainer)
    for other in runs[1:]:
        assert_same_run(runs[0], other.model, other.optimizer)
