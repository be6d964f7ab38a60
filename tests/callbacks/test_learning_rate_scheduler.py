"""LearningRateScheduler."""

import json

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import Do, Ones, ramp, trainer_of

from mlx_fit import ConfigurationError, LearningRateScheduler, ReduceLROnPlateau, Trainer


def fit(schedule, epochs=1, learning_rate=0.03, **options):
    trainer = trainer_of(learning_rate=learning_rate)
    options = {"callbacks": LearningRateScheduler(schedule), "verbose": 0} | options
    history = trainer.fit(ramp(2), epochs=epochs, **options)
    return history.history["learning_rate"]


def test_the_numbers_are_kerass():
    assert fit(lambda epoch: 1 / (2 + epoch)) == [0.5]
    assert fit(lambda epoch, rate: rate / 2, epochs=2) == pytest.approx([0.015, 0.0075])


def test_the_epoch_is_absolute_and_counted_from_zero():
    seen = []
    fit(lambda epoch: seen.append(epoch) or 0.1, epochs=5, initial_epoch=3)
    assert seen == [3, 4]


def test_the_rate_is_the_one_the_update_takes():
    trainer = trainer_of()
    callback = LearningRateScheduler(lambda epoch: 0.0)
    trainer.fit(ramp(2), callbacks=callback, verbose=0)
    assert mx.array_equal(trainer.model.weight, mx.ones((4, 3)))


def test_what_is_returned_may_be_of_any_kind_of_number():
    for rate in (1, np.float32(0.5), np.array(0.5), mx.array(0.5)):
        assert fit([rate].__getitem__, learning_rate=0.1)[0] in (1.0, 0.5)


def test_a_default_argument_is_the_present_rate_and_a_class_may_be_the_schedule():
    class Halving:
        def __call__(self, epoch, rate):
            return rate / 2

    assert fit(Halving(), epochs=2) == pytest.approx([0.015, 0.0075])
    assert fit(lambda epoch, rate=9.0: rate) == pytest.approx([0.03])


@pytest.mark.parametrize("wrong", [None, "0.1", float("nan"), float("inf"), -0.1, True, [0.1]])
def test_what_is_no_rate_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="schedule returned"):
        fit(lambda epoch: wrong)


def test_a_type_error_in_the_schedule_is_the_users():
    with pytest.raises(TypeError, match="unsupported operand"):
        fit(lambda epoch: epoch + "1")


def test_what_is_no_function_is_refused():
    with pytest.raises(ConfigurationError, match=r"schedule=0.1; expected a function"):
        LearningRateScheduler(0.1)


def test_a_schedule_on_the_optimizer_is_refused_when_fit_starts():
    with pytest.raises(ConfigurationError, match="LearningRateScheduler sets the learning rate"):
        fit(lambda epoch: 0.1, learning_rate=lambda step: 0.1)


def test_it_goes_with_a_plateau():
    callbacks = [LearningRateScheduler(lambda e, r: r / 2), ReduceLROnPlateau("loss", 0.1, 1)]
    trainer = trainer_of(learning_rate=0.4)
    history = trainer.fit(ramp(1), epochs=3, callbacks=callbacks, verbose=0)
    assert history.history["learning_rate"] == pytest.approx([0.2, 0.1, 0.005])


def test_parts_of_a_multi_optimizer_keep_their_own_rates():
    parts = [optim.SGD(0.1), optim.SGD(0.01)]
    optimizer = optim.MultiOptimizer(parts, [lambda name, _: name == "nothing"])
    trainer = Trainer(Ones(), optimizer, "mse")
    callback = LearningRateScheduler(lambda epoch, rate: rate / 2)
    trainer.fit(ramp(1), callbacks=callback, verbose=0)
    assert [part.learning_rate.item() for part in parts] == pytest.approx([0.05, 0.005])


def test_a_resumed_epoch_does_not_get_its_rate_twice():
    first = LearningRateScheduler(lambda epoch, rate: rate / 2)
    trainer = trainer_of(learning_rate=0.4)
    trainer.fit(ramp(1), epochs=2, callbacks=first, verbose=0)
    state = json.loads(json.dumps(first.state_dict()))
    second = LearningRateScheduler(lambda epoch, rate: rate / 2)
    load = Do("on_train_begin", lambda _: second.load_state_dict(state))
    options = {"initial_epoch": 1, "epochs": 3, "callbacks": [second, load], "verbose": 0}
    history = trainer.fit(ramp(1), **options)
    assert history.history["learning_rate"] == pytest.approx([0.1, 0.05])


def test_it_says_the_rate_when_asked(capsys):
    for verbose in (0, 1):
        callback = LearningRateScheduler(lambda epoch: 0.25, verbose=verbose)
        trainer_of().fit(ramp(1), callbacks=callback, verbose=0)
    assert capsys.readouterr().out == (
        "Epoch 1: LearningRateScheduler setting learning rate to 0.25.\n"
    )
