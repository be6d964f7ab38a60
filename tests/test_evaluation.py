"""Evaluation and prediction: they compute in evaluation mode and leave no trace."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fit import ConfigurationError, Trainer


class Net(nn.Module):
    """Dropout, BatchNorm, and noise that evaluation draws too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm(8)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(8, 3)
        self.noise = 0.0

    def __call__(self, x):
        hidden = self.dropout(self.norm(self.first(x)))
        return self.last(hidden + self.noise * mx.random.normal(hidden.shape, hidden.dtype))


def make(noise=0.0, **options):
    mx.random.seed(1)
    model = Net()
    model.noise = noise
    mx.eval(model.parameters())
    return Trainer(model, optim.Adam(0.01), "cross_entropy", ["accuracy"], batch_size=8, **options)


def data(n=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, n)


def everything(trainer):
    arrays = tree_flatten(trainer.model.parameters()) + tree_flatten(trainer.optimizer.state)
    modes = [module.training for module in trainer.model.modules()]
    key = mx.random.state[0].tolist()
    return [np.array(value).tolist() for _, value in arrays], modes, key


def logits_by_hand(model, x):
    norm = model.norm
    hidden = x @ np.array(model.first.weight).T + np.array(model.first.bias)
    hidden = (hidden - np.array(norm.running_mean)) / np.sqrt(np.array(norm.running_var) + norm.eps)
    hidden = hidden * np.array(norm.weight) + np.array(norm.bias)
    return hidden @ np.array(model.last.weight).T + np.array(model.last.bias)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_dropout_is_off_and_running_statistics_are_used(compile):
    trainer, (x, y) = make(compile=compile), data()
    trainer.fit((x, y), epochs=2, verbose=0)
    expected = logits_by_hand(trainer.model, x)
    np.testing.assert_allclose(trainer.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    losses = np.log(np.exp(expected).sum(-1)) - expected[np.arange(20), y]
    found = trainer.evaluate((x, y), verbose=0)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((expected.argmax(-1) == y).mean())


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_nothing_is_left_behind(precision, compile):
    trainer = make(noise=0.1, compile=compile, precision=precision)
    trainer.fit(data(), verbose=0)
    before = everything(trainer)
    x, y = data()
    calls = [
        lambda: trainer.evaluate((x, y), verbose=0),
        lambda: trainer.predict(x, verbose=0),
        lambda: trainer.test_on_batch(x, y),
        lambda: trainer.predict_on_batch(x),
        lambda: next(iter(trainer.predict_batches(x, verbose=0))),
        lambda: trainer.evaluate((x, y), steps=1, verbose=0),
    ]
    for call in calls:
        call()
        assert everything(trainer) == before


def test_modes_the_user_chose_are_restored():
    """A part in evaluation mode stays there in training, and is there again after evaluating."""
    trainer = make()
    trainer.model.norm.eval()
    statistics = np.array(trainer.model.norm.running_mean)
    trainer.fit(data(), data(), epochs=2, verbose=0)
    np.testing.assert_array_equal(np.array(trainer.model.norm.running_mean), statistics)
    assert not trainer.model.norm.training
    assert trainer.model.dropout.training
    assert trainer.model.training
    trainer.evaluate(data(), verbose=0)
    assert [m.training for m in (trainer.model, trainer.model.norm)] == [True, False]


def test_a_model_that_comes_in_evaluation_mode_is_trained_in_training_mode():
    """mlx-lm loads models so; dropout would be off."""
    trainer, seen = make(), []
    trainer.model.eval()

    def loss(outputs, targets):
        seen.append([module.training for module in trainer.model.modules()])
        return nn.losses.cross_entropy(outputs, targets)

    trainer = Trainer(trainer.model, optim.SGD(0.1), loss)
    trainer.fit(data(), data(), verbose=0)
    assert [all(modes) for modes in seen] == [True, False]
    assert not any(module.training for module in trainer.model.modules())


def test_validation_sees_the_weights_of_its_epoch():
    trainer, (x, y) = make(), data()
    history = trainer.fit((x, y), (x, y), epochs=2, verbose=0)
    assert history.history["val_loss"][-1] == trainer.evaluate((x, y), verbose=0)["loss"]
    assert history.history["val_loss"][0] != history.history["val_loss"][1]


def test_evaluation_and_prediction_follow_a_layer_that_was_replaced():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    trainer, (x, y) = Trainer(model, optim.SGD(0.1), "mse"), data()
    y = np.eye(3, dtype=np.float32)[y]
    trainer.predict(x, verbose=0)
    trainer.evaluate((x, y), verbose=0)
    model.layers[1] = nn.Tanh()
    expected = np.tanh(x @ np.array(model.layers[0].weight).T + np.array(model.layers[0].bias))
    np.testing.assert_allclose(trainer.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)
    loss = trainer.evaluate((x, y), verbose=0)["loss"]
    assert loss == pytest.approx(((expected - y) ** 2).mean(), rel=1e-5)


def test_evaluation_of_weight_zero_leaves_the_keys_out_with_a_warning():
    trainer, (x, y) = make(), data()
    weights = np.zeros(20, np.float32)
    for batch in ((x, y, weights), tuple(map(mx.array, (x, y, weights)))):
        with pytest.warns(UserWarning, match="weights of all rows sum to 0"):
            assert trainer.evaluate([batch], verbose=0) == {}


def test_batches_of_weight_zero_change_no_evaluation():
    trainer, (x, y) = make(), data()
    ones = np.ones(20, np.float32)
    found = trainer.evaluate([(x, y, 0 * ones), (x, y, ones), (x, y, 0 * ones)], verbose=0)
    assert found == trainer.evaluate((x, y), batch_size=20, verbose=0)


def test_any_batch_size_gives_the_same_values():
    trainer, (x, y) = make(), data()
    weights = np.random.default_rng(3).random(20)
    whole = trainer.evaluate((x, y, weights), batch_size=20, verbose=0)
    for size in (1, 3, 7, 19):
        assert trainer.evaluate((x, y, weights), batch_size=size, verbose=0) == pytest.approx(
            whole, rel=1e-5
        )


def test_predictions_keep_the_order_of_rows():
    trainer, (x, _) = make(), data(21)
    whole = trainer.predict(x, batch_size=21, verbose=0)
    parts = list(trainer.predict_batches(x, batch_size=8, verbose=0))
    assert [len(part) for part in parts] == [8, 8, 5]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_what_a_forward_pass_stores_in_the_model_is_not_kept(compile):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self._kept = nn.Linear(4, 3), mx.array(7.0)

        def __call__(self, x):
            self._kept = self.last(x).mean()
            return self.last(x)

    model, (x, y) = Keeps(), data()
    trainer = Trainer(model, loss="cross_entropy", compile=compile, batch_size=10)
    trainer.evaluate((x, y), verbose=0)
    trainer.predict(x, verbose=0)
    assert model._kept.item() == 7


def test_outputs_without_rows_are_told_where_they_would_be_put_in_order():
    class Sum(nn.Module):
        def __call__(self, x):
            return x.sum()

    trainer, x = Trainer(Sum(), None, None), np.ones((6, 2), np.float32)
    with pytest.raises(ConfigurationError, match=r"returned a scalar.*Use predict_batches"):
        trainer.predict(x, batch_size=4)
    assert [float(part) for part in trainer.predict_batches(x, batch_size=4)] == [8.0, 4.0]
