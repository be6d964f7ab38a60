"""ReduceLROnPlateau, against numbers measured on Keras."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from toys import Do, Ones, ramp, scripted, trainer_of

from mlx_fit import ConfigurationError, ReduceLROnPlateau, Trainer, UnknownMonitorError

NAN = float("nan")


def rates(values, learning_rate=0.1, **options):
    """The rate after each epoch, for values of the monitor."""
    after, callback = [], ReduceLROnPlateau(**options)
    callbacks = [
        scripted("val_loss", values),
        callback,
        Do("on_epoch_end", lambda run: after.append(run.learning_rate)),
    ]
    trainer = trainer_of(learning_rate=learning_rate)
    options = {"epochs": len(values), "callbacks": callbacks, "verbose": 0}
    history = trainer.fit(ramp(1), ramp(1), **options)
    return after, history, callback


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"factor": 0.1, "patience": 1}, [0.1, 0.01, 0.001]),
        ({"factor": 0.5, "patience": 2}, [0.1, 0.1, 0.05, 0.05, 0.025]),
        ({"factor": 0.1, "patience": 0}, [0.1, 0.01, 0.001]),
        ({"factor": 0.1, "patience": 1, "min_lr": 0.005}, [0.1, 0.01, 0.005, 0.005]),
        (
            {"factor": 0.1, "patience": 1, "cooldown": 2},
            [0.1, 0.01, 0.01, 0.001, 0.001, 0.0001],
        ),
        (
            {"factor": 0.1, "patience": 2, "cooldown": 2},
            [0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001, 0.0001],
        ),
    ],
)
def test_a_flat_value_lowers_the_rate_as_in_keras(options, expected):
    assert rates([1.0] * len(expected), **options)[0] == pytest.approx(expected)


def test_below_min_lr_no_reduction_is_counted():
    assert rates([1.0] * 6, patience=1, min_lr=0.005)[2].num_reductions == 2


def test_the_history_holds_the_rate_before_the_cut():
    _, history, _ = rates([1.0] * 3, patience=1)
    assert history.history["learning_rate"] == pytest.approx([0.1, 0.1, 0.01])
    assert all(type(rate) is float for rate in history.history["learning_rate"])


def test_the_next_update_takes_the_lower_rate():
    callbacks = [scripted("loss", [1.0, 1.0, 1.0]), ReduceLROnPlateau("loss", 0.0, 1)]
    weights, trainer = [], trainer_of()
    look = Do("on_epoch_end", lambda run: weights.append(run.model.weight[0, 0].item()))
    trainer.fit(ramp(2), epochs=3, callbacks=[*callbacks, look], verbose=0)
    assert weights[0] != weights[1] == weights[2]


def test_an_improvement_is_larger_than_min_delta():
    assert rates([1.0, 0.99995], patience=1)[0][-1] == pytest.approx(0.01)
    assert rates([1.0, 0.99985], patience=1)[0][-1] == pytest.approx(0.1)
    assert rates([1.0, 0.99995], patience=1, min_delta=0)[0][-1] == pytest.approx(0.1)


def test_mode_max_wants_higher_values():
    assert rates([1.0, 2.0], patience=1, mode="max")[0][-1] == pytest.approx(0.1)
    assert rates([1.0, 2.0], patience=1)[0][-1] == pytest.approx(0.01)


def test_epochs_without_the_value_change_nothing_and_nan_is_no_improvement():
    assert rates([1.0, None, None, None], patience=1)[0] == pytest.approx([0.1] * 4)
    assert rates([NAN, 1.0, NAN], patience=2)[0] == pytest.approx([0.1, 0.1, 0.1])
    assert rates([1.0, NAN, NAN], patience=2)[0] == pytest.approx([0.1, 0.1, 0.01])


def test_evaluations_inside_epochs_are_judged():
    trainer, callback = trainer_of(), ReduceLROnPlateau(patience=2, min_delta=100)
    options = {"validation_freq": "1 steps", "callbacks": callback, "verbose": 0}
    trainer.fit(ramp(5), ramp(1), **options)
    assert callback.num_reductions == 2


def test_a_new_fit_starts_over():
    callback = ReduceLROnPlateau("loss", patience=2)
    for _ in range(2):
        trainer = trainer_of(learning_rate=0.1)
        callbacks = [scripted("loss", [1.0, 1.0]), callback]
        trainer.fit(ramp(1), epochs=2, callbacks=callbacks, verbose=0)
        assert trainer.learning_rate == pytest.approx(0.1)
        assert (callback.best, callback.wait) == (1.0, 1)


def test_its_state_goes_through_json_and_the_run_goes_on_as_if_unbroken():
    whole, _, _ = rates([1.0] * 6, patience=3, cooldown=1)
    _, _, first = rates([1.0] * 3, patience=3, cooldown=1)
    state, second, after = json.loads(json.dumps(first.state_dict())), None, []
    second = ReduceLROnPlateau(patience=3, cooldown=1)
    callbacks = [
        scripted("val_loss", [1.0] * 6),
        second,
        Do("on_train_begin", lambda _: second.load_state_dict(state)),
        Do("on_epoch_end", lambda run: after.append(run.learning_rate)),
    ]
    options = {"epochs": 6, "initial_epoch": 3, "callbacks": callbacks, "verbose": 0}
    trainer_of(learning_rate=0.1).fit(ramp(1), ramp(1), **options)
    assert after == whole[3:]
    assert after[0] == pytest.approx(0.01)


def test_every_rate_of_a_multi_optimizer_is_lowered():
    model = nn.Linear(4, 3)
    parts = [optim.SGD(0.1), optim.SGD(0.01)]
    optimizer = optim.MultiOptimizer(parts, [lambda name, _: name == "weight"])
    callbacks = [scripted("loss", [1.0, 1.0]), ReduceLROnPlateau("loss", patience=1)]
    Trainer(model, optimizer, "mse").fit(ramp(1), epochs=2, callbacks=callbacks, verbose=0)
    assert [part.learning_rate.item() for part in parts] == pytest.approx([0.01, 0.001])


def test_a_schedule_on_the_optimizer_is_refused_when_fit_starts():
    trainer = trainer_of(learning_rate=lambda step: 0.1 / (1 + step))
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau sets the learning rate"):
        trainer.fit(ramp(1), callbacks=ReduceLROnPlateau("loss"), verbose=0)


def test_an_optimizer_without_a_rate_is_refused():
    trainer = Trainer(Ones(), optim.Adafactor(), "mse")
    with pytest.raises(ConfigurationError, match="Adafactor has none"):
        trainer.fit(ramp(1), callbacks=ReduceLROnPlateau("loss"), verbose=0)


def test_an_unknown_monitor_is_named():
    with pytest.raises(UnknownMonitorError, match="'val_loss'"):
        trainer_of().fit(ramp(1), callbacks=ReduceLROnPlateau(), verbose=0)


def test_lowering_traces_nothing_anew():
    shapes = []

    def loss(outputs, targets):
        shapes.append(outputs.shape)
        return mx.square(outputs - targets)

    trainer = trainer_of(loss=loss, metrics=[], learning_rate=1)  # an integer rate, even
    callbacks = [scripted("loss", [1.0] * 4), ReduceLROnPlateau("loss", patience=1)]
    trainer.fit(ramp(2)[:1] * 2, epochs=4, callbacks=callbacks, verbose=0)
    assert len(shapes) <= 2  # the second where an integer rate became a float


def test_it_says_what_it_does_when_asked(capsys):
    rates([1.0, 1.0], patience=1, verbose=1)
    assert capsys.readouterr().out == (
        "Epoch 2: ReduceLROnPlateau reducing learning rate to 0.01.\n"
    )
    rates([1.0, 1.0], patience=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factor": 1.0}, r"factor=1.0; expected a number below 1"),
        ({"factor": -0.1}, r"factor=-0.1"),
        ({"factor": "0.1"}, r"factor='0.1'"),
        ({"patience": -1}, r"patience=-1"),
        ({"cooldown": 1.5}, r"cooldown=1.5"),
        ({"min_lr": -1}, r"min_lr=-1"),
        ({"min_lr": NAN}, r"min_lr=nan"),
        ({"mode": "lowest"}, r"mode='lowest'"),
        ({"min_delta": None}, r"min_delta=None"),
        ({"monitor": 3}, r"monitor=3"),
    ],
)
def test_a_wrong_argument_is_named(options, says):
    with pytest.raises(ConfigurationError, match=says):
        ReduceLROnPlateau(**options)
