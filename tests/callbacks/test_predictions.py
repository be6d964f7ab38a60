"""Predictions."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_tensorboard import summaries
from toys import Do, Ones, ramp, rows_of_ones, trainer_of

from mlx_fit import EMA, ConfigurationError, Predictions


def tables(folder):
    return [
        (step, value.tensor.string_val[0].decode())
        for _, step, value in summaries(folder / "predictions")
    ]


def fit(callback, trainer=None, **options):
    options = {"epochs": 2, "callbacks": callback, "verbose": 0} | options
    return (trainer or trainer_of(learning_rate=0.0)).fit(ramp(2), **options)


def test_a_table_per_epoch_holds_outputs_and_targets(tmp_path):
    callback = Predictions((np.ones((2, 4), np.float32), np.zeros((2, 3))), tmp_path)
    fit(callback)
    written = tables(tmp_path)
    assert [step for step, _ in written] == [0, 1]
    assert written[0][1].splitlines() == [
        "| row | target | output |",
        "|---|---|---|",
        "| 0 | 0, 0, 0 | 4, 4, 4 |",
        "| 1 | 0, 0, 0 | 4, 4, 4 |",
    ]
    assert callback.table() == written[1][1]
    assert callback.outputs.shape == (2, 3)


def test_classes_have_names_and_probabilities(tmp_path):
    model = Ones()
    model.weight = mx.array([[0.0, np.log(3.0), -50.0]])
    x = np.ones((1, 1), np.float32)
    callback = Predictions((x, np.array([2])), tmp_path, class_names=["cat", "dog"])
    trainer = trainer_of(model, learning_rate=0.0, metrics=[])
    data = [(np.ones((2, 1), np.float32), np.zeros((2, 3), np.float32))]
    trainer.fit(data, callbacks=callback, verbose=0)
    assert callback.table().splitlines()[-1] == "| 0 | 2 | dog (75.0 %) |"


def test_inputs_alone_have_no_targets_and_names_make_classes(tmp_path):
    callback = Predictions(np.ones((1, 4), np.float32), tmp_path)
    fit(callback)
    assert callback.table().splitlines() == ["| row | output |", "|---|---|", "| 0 | 4, 4, 4 |"]
    callback = Predictions(np.ones((1, 4), np.float32), tmp_path, ["a", "b", "c"])
    fit(callback)
    assert callback.table().splitlines()[-1] == "| 0 | a (33.3 %) |"


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (2, [1, 3])])
def test_every_and_max_rows(tmp_path, every, steps):
    data = rows_of_ones(30)
    fit(Predictions(data, tmp_path, every=every, max_rows=5), epochs=4)
    assert [step for step, _ in tables(tmp_path)] == steps
    assert len(tables(tmp_path)[0][1].splitlines()) == 2 + 5


def test_the_averages_predict(tmp_path):
    callback, trainer = Predictions(np.ones((1, 4), np.float32), tmp_path), trainer_of()
    ema = EMA(0.9)
    fit([ema, callback], trainer)
    average = ema.averages()["weight"][:, 0].sum().item()
    assert callback.outputs[0, 0] == pytest.approx(average, rel=1e-6)
    assert callback.outputs[0, 0] != pytest.approx(4 * trainer.model.weight[0, 0].item(), rel=1e-6)


def test_training_does_not_notice(tmp_path):
    def losses(callbacks):
        mx.random.seed(1)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
        return fit(callbacks, trainer_of(model), epochs=3).history["loss"]

    assert losses(Predictions(rows_of_ones(4), tmp_path)) == losses([])


def test_a_resumed_run_has_each_table_once(tmp_path):
    states, first = [], Predictions(rows_of_ones(2), tmp_path)
    keep = Do("on_epoch_end", lambda _: states.append(json.dumps(first.state_dict())), 1)
    fit([first, keep], epochs=4)
    second = Predictions(rows_of_ones(2), tmp_path)
    load = Do("on_train_begin", lambda _: second.load_state_dict(json.loads(states[0])))
    fit([second, load], initial_epoch=2, epochs=5)
    assert [step for step, _ in tables(tmp_path)] == [0, 1, 2, 3, 4]


def test_inputs_and_outputs_may_be_dicts(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.ones((4, 3))

        def __call__(self, a, b):
            return {"sum": (a + b) @ self.weight, "first": a[:, 0]}

    x = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32)}
    y = {"sum": np.zeros((2, 3), np.float32), "first": np.zeros(2, np.float32)}
    callback = Predictions(x, tmp_path, max_rows=1)
    trainer = trainer_of(Two(), loss={"sum": "mse", "first": "mse"}, metrics=[])
    trainer.fit([(x, y)], callbacks=callback, verbose=0)
    assert callback.table().splitlines()[-1].startswith("| 0 | sum: 7.")
    assert "first: 1" in callback.table()


@pytest.mark.parametrize("x", [np.ones((2, 4), np.float32), [[1.0] * 4, [1.0] * 4]])
def test_weights_are_not_looked_at_and_lists_are_rows(tmp_path, x):
    callback = Predictions((x, np.zeros((2, 3)), np.ones(2)), tmp_path)
    trainer_of().fit(ramp(1), callbacks=callback, verbose=0)
    assert callback.outputs.shape == (2, 3)
    assert callback.table().splitlines()[0] == "| row | target | output |"


def test_long_outputs_are_cut(tmp_path):
    model = nn.Linear(4, 20)
    callback = Predictions(np.ones((1, 4), np.float32), tmp_path)
    data = [(np.ones((2, 4), np.float32), np.zeros((2, 20), np.float32))]
    trainer_of(model).fit(data, callbacks=callback, verbose=0)
    assert callback.table().count(",") == 8


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ((np.ones((2, 4)), np.ones(3)), {}, "2 rows of inputs and 3 of targets"),
        (np.ones((0, 4)), {}, "0 rows"),
        (3, {}, "data=3; expected arrays"),
        ({}, {}, "data={}; expected arrays"),
        ((), {}, "0 rows"),
        (np.ones((2, 4)), {"class_names": "abc"}, "class_names='abc'"),
        (np.ones((2, 4)), {"every": 0}, "every=0"),
        (np.ones((2, 4)), {"max_rows": 0}, "max_rows=0"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, data, options, says):
    with pytest.raises(ConfigurationError, match=f"Predictions: .*{says}"):
        Predictions(data, tmp_path, **options)


def test_a_table_before_the_fit_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="nothing was predicted yet"):
        Predictions(np.ones((2, 4)), tmp_path).table()
