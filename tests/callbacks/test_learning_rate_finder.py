"""LearningRateFinder and find_learning_rate."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import Do, batch_of, raising, ramp, trainer_of

from mlx_fit import ConfigurationError, DataLoader, LearningRateFinder, Trainer
from mlx_fit.callbacks import find_learning_rate

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype(np.float32)
Y = (X @ RNG.normal(size=(4, 3)) + 0.1).astype(np.float32)


def make(optimizer=None, **options):
    mx.random.seed(7)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3))
    mx.eval(model.parameters())
    mx.random.seed(8)
    options = {"batch_size": 8} | options
    return Trainer(model, optimizer or optim.Adam(1e-3), "mse", **options)


def bits(trainer):
    """Everything that a later fit depends on, as comparable values."""
    arrays = tree_flatten([trainer.model.parameters(), trainer.optimizer.state])
    return {
        "arrays": {name: np.array(value).tobytes() for name, value in arrays},
        "key": mx.random.state[0].tolist(),
        "initialized": trainer.optimizer._initialized,
        "state": {k: v for k, v in trainer.state_dict().items() if type(v) in (int, list)},
        "scale": {k: v.item() for k, v in trainer.state_dict()["loss_scale"].items()},
        "fields": {k: v for k, v in vars(trainer).items() if isinstance(v, (int, float, str))},
    }


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
@pytest.mark.parametrize("fitted", [False, True])
def test_the_test_leaves_every_bit_as_it_was(precision, fitted):
    trainer = make(precision=precision, seed=3)
    if fitted:
        trainer.fit((X, Y), epochs=1, verbose=0)
    before, history = bits(trainer), trainer.history
    finder = find_learning_rate(trainer, (X, Y), num_steps=30, max_rate=10.0)
    assert bits(trainer) == before
    assert trainer.history is history
    assert len(finder.losses) > 10


@pytest.mark.parametrize("seed", [None, 5])
def test_a_later_fit_is_that_of_a_trainer_without_the_test(seed):
    trainer, plain = make(seed=seed), None
    trainer._order_seed = 11
    find_learning_rate(trainer, (X, Y), num_steps=12)
    found = trainer.fit((X, Y), epochs=2, verbose=0)
    plain = make(seed=seed)
    plain._order_seed = 11
    assert plain.fit((X, Y), epochs=2, verbose=0).history == found.history
    assert bits(plain)["arrays"] == bits(trainer)["arrays"]


def test_rates_rise_evenly_by_their_logarithm():
    finder = find_learning_rate(make(), (X, Y), min_rate=1e-5, max_rate=1e-1, num_steps=5)
    assert finder.rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_losses_are_the_smoothed_losses_of_a_hand_written_loop():
    trainer = trainer_of(metrics=[])
    data = ramp(6)
    finder = find_learning_rate(
        trainer, data, min_rate=1e-4, max_rate=1e-2, num_steps=6, smoothing=0.5, stop_factor=None
    )
    weight, mean, expected = np.ones((4, 3), np.float32), 0.0, []
    for n, (x, y) in enumerate(data):
        outputs = x @ weight
        mean = 0.5 * mean + 0.5 * np.square(outputs - y).mean()
        expected.append(mean / (1 - 0.5 ** (n + 1)))
        rate = 1e-4 * 100 ** (n / 5)
        weight = weight - rate * x.T @ (2 * (outputs - y) / outputs.size)
    assert finder.losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 33])
def test_the_suggestion_is_where_the_loss_falls(seed):
    """With seed 33 the first batch has the lowest loss of all."""
    trainer = make(seed=seed)
    finder = find_learning_rate(trainer, (X, Y), min_rate=1e-6, max_rate=10.0, num_steps=80)
    lowest = finder.rates[10 + int(np.argmin(finder.losses[10:]))]
    assert 1e-4 < finder.suggestion <= lowest
    index = finder.rates.index(finder.suggestion)
    assert finder.losses[index + 1] < finder.losses[index - 1]


def test_it_ends_when_the_loss_explodes_and_stop_factor_decides():
    options = {"min_rate": 1e-3, "max_rate": 1e3, "num_steps": 60}
    early = find_learning_rate(make(optim.SGD(0.1)), (X, Y), **options)
    assert len(early.losses) < 60
    later = find_learning_rate(make(optim.SGD(0.1)), (X, Y), **options, stop_factor=1e6)
    assert len(early.losses) < len(later.losses)
    assert early.suggestion is not None


def test_a_loss_that_is_no_number_ends_the_test_and_raises_nothing():
    data = [batch_of(1)] * 15 + [batch_of(float("nan"))] + [batch_of(1)] * 9
    trainer = trainer_of()
    finder = find_learning_rate(trainer, data, num_steps=25, stop_factor=None)
    assert len(finder.losses) == 16
    assert mx.array_equal(trainer.model.weight, mx.ones((4, 3)))


def test_windows_of_batches_are_steps():
    trainer = make(gradient_accumulation=3)
    finder = find_learning_rate(trainer, (X, Y), num_steps=7, stop_factor=None)
    assert len(finder.rates) == len(finder.losses) == 7


def test_short_data_is_passed_over_again_and_a_loader_stands_where_it_stood():
    loader = DataLoader(list(zip(X, Y, strict=True))[:20], batch_size=5, shuffle=True, seed=1)
    next(iter(loader))
    before = loader.state_dict()
    finder = find_learning_rate(make(), loader, num_steps=15, stop_factor=None)
    assert len(finder.losses) == 15
    assert loader.state_dict() == before


def test_as_a_callback_it_ends_the_fit_and_puts_the_weights_back():
    trainer, finder = make(), LearningRateFinder(num_steps=6, stop_factor=None)
    weights = bits(trainer)["arrays"]
    history = trainer.fit((X, Y), epochs=3, callbacks=finder, verbose=0)
    assert history.stopped_by == "LearningRateFinder"
    assert len(finder.losses) == 6
    assert {k: bits(trainer)["arrays"][k] for k in weights} == weights
    trainer.fit((X, Y), epochs=1, callbacks=finder, verbose=0)
    assert len(finder.losses) == 6  # another fit is another test


def test_after_an_error_everything_is_back():
    trainer = make()
    before = bits(trainer)
    breaks = Do("on_train_batch_end", raising(OSError("x")), 3)
    with pytest.raises(OSError, match="x"):
        trainer.fit((X, Y), callbacks=[LearningRateFinder(), breaks], verbose=0)
    after = bits(trainer)["arrays"]
    assert all(after[name] == value for name, value in before["arrays"].items())
    assert mx.random.state[0].tolist() == before["key"]


def test_a_schedule_on_the_optimizer_is_refused():
    trainer = make(optim.SGD(lambda step: mx.array(0.1)))
    with pytest.raises(ConfigurationError, match="LearningRateFinder sets the learning rate"):
        find_learning_rate(trainer, (X, Y))


def test_the_plot_shows_the_curve_and_the_suggestion():
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigurationError, match="nothing was tried yet"):
        LearningRateFinder().plot()
    finder = find_learning_rate(make(), (X, Y), min_rate=1e-6, max_rate=10.0, num_steps=60)
    (axis,) = finder.plot().axes
    curve, point = axis.lines
    assert list(curve.get_ydata()) == finder.losses
    assert point.get_xdata()[0] == finder.suggestion
    assert axis.get_xscale() == "log"


def test_too_few_steps_or_no_fall_suggest_nothing():
    assert find_learning_rate(make(), (X, Y), num_steps=2).suggestion is None
    flat = LearningRateFinder()
    flat.rates, flat.losses = [10.0**n for n in range(20)], [float(n) for n in range(20)]
    assert flat.suggestion is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_rate": 0}, "min_rate=0"),
        ({"min_rate": 1.0}, "max_rate=1.0; expected more than min_rate=1.0"),
        ({"num_steps": 1}, "num_steps=1"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"stop_factor": "4"}, "stop_factor='4'"),
    ],
)
def test_a_wrong_argument_is_named(options, says):
    with pytest.raises(ConfigurationError, match=f"LearningRateFinder: {says}"):
        LearningRateFinder(**options)
