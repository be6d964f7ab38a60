"""``Trainer.evaluate`` and ``test_on_batch``."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toys import Do, Ones, Recorder, batch_of, ramp, rows_of_ones, still_trainer, trainer_of

from mlx_fit import ConfigurationError, DataError, LambdaCallback, Trainer


def test_loss_and_metrics_come_as_a_dict_of_floats():
    assert trainer_of().evaluate(rows_of_ones(), verbose=0) == {"loss": 16.0, "mae": 4.0}
    assert trainer_of(metrics=[]).evaluate(rows_of_ones(), verbose=0) == {"loss": 16.0}


@pytest.mark.parametrize("batch_size", [1, 8, 64, 66, 100])
def test_uneven_batches_give_the_mean_over_all_rows(batch_size, rng):
    x, y = rng.normal(size=(66, 4)).astype(np.float32), rng.normal(size=(66, 3)).astype(np.float32)
    expected = np.mean((x.astype(np.float64) @ np.ones((4, 3)) - y) ** 2)
    found = trainer_of().evaluate((x, y), batch_size=batch_size, verbose=0)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_weights_count_in_loss_and_metrics():
    x, y = rows_of_ones(4)
    x[2:] = 2
    found = trainer_of().evaluate((x, y, np.array([1, 0, 3, 0])), verbose=0)
    assert found == {"loss": (16 + 3 * 64) / 4, "mae": (4 + 3 * 8) / 4}


def test_a_key_without_weight_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="without loss.*sum to 0"):
        found = trainer_of().evaluate((*rows_of_ones(), np.zeros(10)), verbose=0)
    assert found == {}


def test_batch_size_and_steps_limit_what_is_read():
    recorder, data = Recorder(), iter(ramp(10))
    still_trainer().evaluate(rows_of_ones(), batch_size=5, callbacks=recorder, verbose=0)
    assert recorder.names.count("test_batch_end") == 2
    assert still_trainer().evaluate(data, steps=3, verbose=0)["loss"] == pytest.approx(80 / 3)
    assert len(list(data)) == 7


def test_only_test_hooks_are_called():
    recorder = Recorder()
    trainer_of().evaluate(ramp(1), callbacks=recorder, verbose=0)
    assert recorder.names == ["test_begin", "test_batch_begin", "test_batch_end", "test_end"]


def test_batch_hooks_see_running_means_and_the_end_sees_the_result():
    running, end = [], {}
    watch = LambdaCallback(
        on_test_batch_end=lambda _, logs: running.extend([logs["loss"], logs.batch["loss"]]),
        on_test_end=end.update,
    )
    found = still_trainer().evaluate(ramp(3), callbacks=watch, verbose=0)
    assert running == pytest.approx([0, 0, 8, 16, 80 / 3, 64])
    assert end == found


def test_stop_evaluating_ends_an_endless_iterator():
    data = (batch_of(i) for i in itertools.count())
    stopper = Do("on_test_batch_end", lambda run: setattr(run, "stop_evaluating", True), index=4)
    trainer = still_trainer()
    assert trainer.evaluate(data, callbacks=stopper, verbose=0)["loss"] == 16 * 30 / 5
    assert next(data)[0][0, 0] == 5
    assert trainer.evaluate(ramp(2), verbose=0)["loss"] == 8.0


def test_nothing_is_updated_and_modes_are_restored():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Dropout(0.5))
    model.layers[2].eval()
    trainer = trainer_of(model)
    trainer.fit(rows_of_ones(), verbose=0)
    before = [mx.array(p) for _, p in nn.utils.tree_flatten(model.parameters())]
    key = mx.random.state[0].tolist()
    trainer.evaluate(rows_of_ones(), verbose=0)
    after = [p for _, p in nn.utils.tree_flatten(model.parameters())]
    assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert mx.random.state[0].tolist() == key
    assert [m.training for m in (model, *model.layers)] == [True, True, True, False]


def test_modes_are_restored_after_a_failure_too():
    trainer = trainer_of()
    with pytest.raises(ValueError, match="shape"):
        trainer.evaluate([(np.ones((2, 5)), np.ones((2, 3)))], verbose=0)
    assert trainer.model.training
    assert trainer.evaluate(rows_of_ones(), verbose=0)["loss"] == 16.0


def test_an_error_of_the_data_reaches_callbacks_and_caller():
    def data():
        yield batch_of(1)
        raise OSError("gone")

    recorder = Recorder()
    with pytest.raises(OSError, match="gone"):
        trainer_of().evaluate(data(), callbacks=recorder, verbose=0)
    assert recorder.names[-1] == "exception"


def test_it_works_without_an_optimizer_but_not_without_a_loss():
    assert Trainer(Ones(), loss="mse").evaluate(rows_of_ones(), verbose=0) == {"loss": 16.0}
    with pytest.raises(ConfigurationError, match="has no loss"):
        Trainer(Ones()).evaluate(rows_of_ones(), verbose=0)


def test_test_on_batch_takes_parts_or_a_batch():
    trainer, (x, y) = trainer_of(), batch_of(1)
    expected = {"loss": 16.0, "mae": 4.0}
    assert trainer.test_on_batch(x, y) == trainer.test_on_batch((x, y)) == expected
    assert trainer.test_on_batch(x, y, np.array([1, 3])) == expected


def test_it_sees_weights_that_changed_since():
    trainer = trainer_of()
    trainer.evaluate(rows_of_ones(), verbose=0)
    trainer.model.weight = mx.full((4, 3), 2.0)
    assert trainer.evaluate(rows_of_ones(), verbose=0)["loss"] == 64.0


@pytest.mark.parametrize("option", [{"steps": 0}, {"steps": -1}, {"steps": "a"}, {"batch_size": 0}])
def test_a_wrong_number_is_named(option):
    with pytest.raises(ConfigurationError, match=f"{next(iter(option))}="):
        trainer_of().evaluate(rows_of_ones(), verbose=0, **option)


def test_empty_data_is_refused():
    for data in ([], iter([]), lambda: iter([])):
        with pytest.raises(DataError, match="data"):
            trainer_of().evaluate(data, verbose=0)
