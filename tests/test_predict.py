"""``Trainer.predict``, ``predict_batches`` and ``predict_on_batch``."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toys import Do, Ones, Recorder, batch_of, raising, ramp, rows_of_ones, trainer_of

from mlx_fit import ConfigurationError, DataError, Trainer
from mlx_fit.text import BucketBatches, PackedBatches


class Function(nn.Module):
    """A model that is a function."""

    def __init__(self, function):
        super().__init__()
        self._function = function

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)


def predict(function, data, **options):
    return Trainer(Function(function)).predict(data, verbose=0, **options)


@pytest.mark.parametrize("batch_size", [1, 8, 66, 100])
def test_every_row_comes_once_and_in_order(batch_size):
    x = np.arange(66, dtype=np.float32)[:, None]
    found = predict(lambda x: 2 * x, x, batch_size=batch_size)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, 2 * x)


def test_targets_and_weights_are_ignored():
    x, y = rows_of_ones()
    for data in (x, (x,), (x, y), (x, y, np.zeros(10)), [(x[:4], y[:4]), (x[4:], y[4:])]):
        assert np.array_equal(trainer_of().predict(data, verbose=0), np.full((10, 3), 4.0))


def test_a_list_is_a_list_of_batches():
    batches = [np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)]
    assert trainer_of().predict(batches, verbose=0).shape == (5, 3)


def test_outputs_keep_their_structure():
    x = np.arange(5, dtype=np.float32)[:, None]
    found = predict(lambda x: {"a": x, "b": (x + 1, [x + 2])}, x, batch_size=2)
    assert set(found) == {"a", "b"}
    assert np.array_equal(found["b"][0], x + 1)
    assert np.array_equal(found["b"][1][0], x + 2)


def test_outputs_that_are_none_stay_none():
    found = predict(lambda x: (x, None), np.ones((5, 1), np.float32), batch_size=2)
    assert found[1] is None
    assert found[0].shape == (5, 1)


def test_inputs_by_name_reach_the_model_by_name():
    data = {"a": np.ones((3, 1), np.float32), "b": np.full((3, 1), 2, np.float32)}
    assert predict(lambda a, b: a - b, data).tolist() == [[-1.0]] * 3


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (mx.bfloat16, np.float32),
        (mx.float16, np.float32),
        (mx.int32, np.int32),
        (mx.bool_, np.bool_),
    ],
)
def test_floats_become_float32_and_others_stay(dtype, expected):
    assert predict(lambda x: x.astype(dtype), np.ones((2, 1))).dtype == expected


def test_steps_limit_what_is_read():
    data = iter(ramp(10))
    assert trainer_of().predict(data, steps=3, verbose=0).shape == (6, 3)
    assert len(list(data)) == 7


def test_stop_predicting_ends_an_endless_iterator():
    data = (batch_of(i) for i in itertools.count())
    stopper = Do("on_predict_batch_end", lambda run: setattr(run, "stop_predicting", True), index=4)
    assert trainer_of().predict(data, callbacks=stopper, verbose=0).shape == (10, 3)
    assert next(data)[0][0, 0] == 5


def test_hooks_are_called_with_the_outputs():
    recorder, shapes = Recorder(), []

    class Watch(Recorder):
        def on_predict_batch_end(self, batch, logs):
            shapes.append(logs["outputs"].shape)

    trainer_of().predict(rows_of_ones(), callbacks=[recorder, Watch()], verbose=0)
    batches = ["predict_batch_begin", "predict_batch_end"] * 3
    assert recorder.names == ["predict_begin", *batches, "predict_end"]
    assert shapes == [(4, 3), (4, 3), (2, 3)]


def failing():
    yield batch_of(1)
    raise OSError("gone")


def test_an_error_of_the_data_reaches_callbacks_and_caller():
    for data, error in ((failing(), OSError), (iter([]), DataError)):
        recorder = Recorder()
        with pytest.raises(error):
            trainer_of().predict(data, callbacks=recorder, verbose=0)
        assert recorder.names[-1] == "exception"


def test_an_error_of_a_callback_reaches_the_others():
    for hook in ("on_predict_begin", "on_predict_batch_end", "on_predict_end"):
        recorder = Recorder()
        breaks = Do(hook, raising(KeyError("mine")))
        with pytest.raises(KeyError, match="mine"):
            trainer_of().predict(ramp(2), callbacks=[breaks, recorder], verbose=0)
        assert recorder.names[-1] == "exception"


def test_predict_batches_gives_one_batch_at_a_time():
    drawn = []

    def data():
        for i in range(3):
            drawn.append(i)
            yield batch_of(i)

    batches = trainer_of().predict_batches(data(), verbose=0)
    assert next(batches).shape == (2, 3)
    assert drawn == [0]
    assert len(list(batches)) == 2


def test_leaving_predict_batches_early_ends_it():
    recorder = Recorder()
    for _ in trainer_of().predict_batches(ramp(5), callbacks=recorder, verbose=0):
        break
    assert recorder.names[-1] == "predict_end"


def test_dropout_is_off_and_the_random_key_stays():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    trainer = trainer_of(model)
    mx.random.seed(0)
    key = mx.random.state[0].tolist()
    found = trainer.predict(rows_of_ones()[0], verbose=0)
    assert np.allclose(found, np.array(model.layers[0](mx.ones((10, 4)))), rtol=1e-6)
    assert mx.random.state[0].tolist() == key
    assert model.training


def test_draws_between_batches_are_the_users_own():
    mx.random.seed(0)
    expected = [mx.random.uniform().item() for _ in range(4)]
    mx.random.seed(0)
    batches = trainer_of().predict_batches(ramp(3), verbose=0)
    assert [mx.random.uniform().item() for _ in batches] == expected[:3]
    assert mx.random.uniform().item() == expected[3]


def test_it_works_without_loss_and_optimizer():
    assert Trainer(Ones()).predict(rows_of_ones()[0], verbose=0).shape == (10, 3)


def test_it_sees_weights_that_changed_since():
    trainer = trainer_of()
    trainer.predict(rows_of_ones(), verbose=0)
    trainer.fit(rows_of_ones(), verbose=0)
    expected = rows_of_ones()[0] @ np.array(trainer.model.weight)
    assert np.allclose(trainer.predict(rows_of_ones(), verbose=0), expected)


def test_predict_on_batch_takes_inputs_or_a_batch():
    x, y = batch_of(1)
    assert trainer_of().predict_on_batch(x).shape == (2, 3)
    assert trainer_of().predict_on_batch((x, y)).shape == (2, 3)


@pytest.mark.parametrize("option", [{"steps": 0}, {"steps": -1}, {"batch_size": 0}])
def test_a_wrong_number_is_named(option):
    with pytest.raises(ConfigurationError, match=f"{next(iter(option))}="):
        trainer_of().predict(rows_of_ones(), verbose=0, **option)


def test_a_wrong_shape_names_the_batch():
    with pytest.raises(ValueError, match="shape") as caught:
        trainer_of().predict(np.ones((3, 5), np.float32), verbose=0)
    assert "x: (3, 5) float32" in str(caught.value.__notes__)


def test_of_text_the_tokens_are_given_to_the_model():
    rows = [(np.arange(1, 4), np.ones(3)), (np.arange(1, 6), np.ones(5))]
    loader = BucketBatches(rows, 1, shuffle=False)
    parts = list(Trainer(Function(lambda tokens: 2 * tokens)).predict_batches(loader, verbose=0))
    assert sorted(np.trim_zeros(part[0]).tolist() for part in parts) == [
        [2, 4, 6],
        [2, 4, 6, 8, 10],
    ]


def test_packed_text_is_refused():
    rows = [(np.arange(1, 4), np.ones(3))] * 2
    with pytest.raises(DataError, match="several documents in a row"):
        predict(lambda tokens: tokens, PackedBatches(rows, 1, 6))
