"""EarlyStopping, case by case."""

import json
import math
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toys import Do, ramp, rows_of_ones, scripted, stop, trainer_of, weight_of

from mlx_fit import ConfigurationError, EarlyStopping, UnknownMonitorError

NAN = math.nan


def run(values, trainer=None, before=(), **options):
    """A fit whose epochs have these values of val_loss (None: no value)."""
    stopping = EarlyStopping(**options)
    callbacks = [scripted(stopping.monitor, values), *before, stopping]
    trainer = trainer or trainer_of()
    trainer.fit(ramp(1), ramp(1), epochs=len(values), callbacks=callbacks, verbose=0)
    return stopping, len(trainer.history.epoch)


@pytest.mark.parametrize(
    ("options", "values", "num_epochs", "best_epoch"),
    [
        # it never stops in the first epoch, and at once afterwards with patience 0
        ({}, [1, 2, 3], 2, 0),
        ({"patience": 1}, [1, 2, 3], 2, 0),
        ({"patience": 2}, [1, 2, 3, 4], 3, 0),
        ({"patience": 2}, [1, 2, 0.5, 2, 3, 4], 5, 2),
        ({}, [3, 2, 1], 3, 2),
        # an improvement is strict, and the sign of min_delta does not matter
        ({"min_delta": 0.5}, [1.0, 0.5, 0.4], 2, 0),
        ({"min_delta": -0.5}, [1.0, 0.5, 0.4], 2, 0),
        ({"min_delta": 0.5}, [1.0, 0.25, 0.2], 3, 1),
        ({"min_delta": 0.5, "mode": "max"}, [0, 0.75, 0.8], 3, 1),
        ({"min_delta": 0.5, "mode": "max"}, [0, 0.5, 0.6], 2, 0),
        # the anchor is the last accepted best
        ({"min_delta": 0.1, "patience": 3}, [1.0, 0.95, 0.92, 0.89], 4, 3),
        ({"min_delta": 0.1, "patience": 2}, [1.0, 0.95, 0.92, 0.89], 3, 0),
        # an improving epoch never stops, though the wait grows until the baseline is beaten
        ({"baseline": 0.5, "patience": 2}, [0.9, 0.8, 0.7, 0.6, 0.55, 0.52], 6, 5),
        ({"baseline": 0.5, "patience": 2}, [0.9, 0.4, 0.45, 0.46, 0.4], 4, 1),
        ({"baseline": 0.5, "patience": 2}, [0.9, 0.95, 0.2], 2, 0),
        # epochs without a value leave the wait as it is
        ({"patience": 2}, [0.9, None, 0.95, None, 0.96, 0.1], 5, 0),
        # NaN is worst and never best
        ({"patience": 2}, [NAN, 0.5, 0.4, NAN, NAN, 0.1], 5, 2),
        ({"patience": 2}, [NAN, NAN, NAN], 2, None),
        ({}, [NAN, 0.5, 0.6], 3, 1),
        # epochs before start_from_epoch are not judged
        ({"start_from_epoch": 2}, [0, 1, 3, 2, 4], 5, 3),
        # 0.0 is a value
        ({"patience": 1}, [0.0, 0.0, -1], 2, 0),
    ],
)
def test_it_stops_when_it_should(options, values, num_epochs, best_epoch):
    stopping, count = run(values, **options)
    assert (count, stopping.best_epoch) == (num_epochs, best_epoch)
    assert stopping.best == (None if best_epoch is None else values[best_epoch])
    stopped = count < len(values) or stopping.stopped_epoch is not None
    assert stopping.stopped_epoch == (count - 1 if stopped else None)


def test_with_validation_every_third_epoch_it_waits_for_validations():
    stopping = EarlyStopping(patience=2)
    trainer = trainer_of(learning_rate=0.0)
    options = {"epochs": 20, "validation_freq": 3, "callbacks": stopping, "verbose": 0}
    assert len(trainer.fit(ramp(1), ramp(1), **options).epoch) == 9


def test_evaluations_inside_epochs_are_judged_one_by_one():
    stopping = EarlyStopping(patience=2)
    trainer = trainer_of(learning_rate=0.0)
    options = {"epochs": 9, "validation_freq": "2 steps", "callbacks": stopping, "verbose": 0}
    history = trainer.fit(ramp(5), ramp(1), **options)
    assert [row["step"] for row in history.evaluations] == [2, 4, 6]
    assert history.epoch == [0, 1]
    assert (trainer.step, stopping.stopped_epoch) == (6, 1)


@pytest.mark.parametrize(
    ("metrics", "monitor", "higher"),
    [
        (["mse"], "val_mse", False),
        (["mse"], "mse", False),
        (["mae"], "val_loss", False),
        (["accuracy"], "val_accuracy", True),
        (["auroc"], "auroc", True),
        (["f1"], "val_f1", True),
    ],
)
def test_the_direction_is_the_metrics_own(metrics, monitor, higher):
    trainer = trainer_of(metrics=[])
    known = trainer_of(nn.Linear(4, 2), loss="cross_entropy", metrics=metrics)
    trainer.direction = known.direction
    assert run([1.0, 2.0, 3.0], trainer, monitor=monitor)[1] == (3 if higher else 2)


def test_a_mode_wins_over_the_direction():
    assert run([1.0, 2.0, 3.0], mode="max")[1] == 3


def test_a_value_nobody_declared_needs_a_mode():
    with pytest.raises(ConfigurationError, match=r"'mine', whose direction nobody declared.*mode="):
        run([1.0], monitor="mine")
    assert run([1.0, 2.0], monitor="mine", mode="min")[1] == 2


def test_a_misspelt_monitor_raises_after_the_first_epoch_and_lists_what_exists():
    with pytest.raises(UnknownMonitorError, match=r"'val_los'.*val_loss") as caught:
        trainer_of().fit(ramp(1), ramp(1), epochs=5, callbacks=EarlyStopping("val_los"), verbose=0)
    assert "val_mae" in caught.value.available


def test_a_validation_value_without_validation_data_raises():
    trainer = trainer_of()
    with pytest.raises(UnknownMonitorError, match="learning_rate, loss, mae"):
        trainer.fit(ramp(1), epochs=5, callbacks=EarlyStopping(), verbose=0)
    assert len(trainer.history.epoch) == 0
    assert trainer.step == 1


def test_a_monitor_may_wait_for_the_first_validation():
    options = {"epochs": 3, "validation_freq": 3, "verbose": 0}
    trainer_of().fit(ramp(1), ramp(1), callbacks=EarlyStopping(), **options)
    with pytest.raises(UnknownMonitorError):
        trainer_of().fit(ramp(1), ramp(1), callbacks=EarlyStopping("val_los"), **options)


def weights_by_epoch(num_epochs, trainer):
    seen = []
    watch = Do("on_epoch_end", lambda run: seen.append(weight_of(run)))
    trainer.fit(ramp(2), epochs=num_epochs, callbacks=watch, verbose=0)
    return seen


@pytest.mark.parametrize(
    ("values", "stop_at", "best_epoch"),
    [([0.5, 0.3, 0.4], None, 1), ([0.5, 0.4, 0.3, 0.9, 0.1], 3, 2)],
    ids=["at the end", "stopped by another"],
)
def test_the_best_weights_come_back_at_any_normal_end(values, stop_at, best_epoch):
    expected = weights_by_epoch(len(values), trainer_of())
    trainer = trainer_of()
    stopping = EarlyStopping(patience=10, restore_best_weights=True)
    stopper = Do("on_epoch_end", stop, stop_at if stop_at is not None else 99)
    callbacks = [scripted("val_loss", values), stopper, stopping]
    trainer.fit(ramp(2), ramp(1), epochs=len(values), callbacks=callbacks, verbose=0)
    assert weight_of(trainer) == expected[best_epoch]


def test_without_it_the_last_weights_stay():
    expected = weights_by_epoch(3, trainer_of())
    trainer = trainer_of()
    stopping = EarlyStopping(patience=10)
    callbacks = [scripted("val_loss", [0.5, 0.3, 0.4]), stopping]
    trainer.fit(ramp(2), ramp(1), epochs=3, callbacks=callbacks, verbose=0)
    assert weight_of(trainer) == expected[2]


def test_running_statistics_come_back_and_the_optimizer_stays():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3))
    trainer, seen = trainer_of(model), []
    watch = Do("on_epoch_end", lambda run: seen.append(np.array(model.layers[1].running_mean)))
    stopping = EarlyStopping(patience=10, restore_best_weights=True)
    callbacks = [scripted("val_loss", [0.1, 0.3, 0.4]), watch, stopping]
    trainer.fit(ramp(4), ramp(1), epochs=3, callbacks=callbacks, verbose=0)
    assert np.array_equal(np.array(model.layers[1].running_mean), seen[0])
    assert trainer.optimizer.step.item() == 12


def test_the_snapshot_is_a_copy():
    trainer = trainer_of(learning_rate=0.0)
    stopping = EarlyStopping(patience=10, restore_best_weights=True)

    def spoil(run):
        run.model.weight[0, 0] = 9.0  # in place

    callbacks = [scripted("val_loss", [0.1, 0.3]), stopping, Do("on_epoch_end", spoil)]
    trainer.fit(ramp(1), ramp(1), epochs=2, callbacks=callbacks, verbose=0)
    assert weight_of(trainer) == 1.0
    weight_before = stopping.state_dict()["best_weights"]["weight"][0, 0].item()
    trainer.fit(ramp(3), verbose=0)
    assert weight_before == 1.0


def test_training_goes_on_from_restored_weights():
    trainer = trainer_of()
    stopping = EarlyStopping(patience=10, restore_best_weights=True)
    callbacks = [scripted("val_loss", [0.1, 0.3]), stopping]
    trainer.fit(ramp(2), ramp(1), epochs=2, callbacks=callbacks, verbose=0)
    trainer.fit(ramp(2), verbose=0)
    expected = weights_by_epoch(2, trainer_of())
    assert weight_of(trainer) == expected[1]


def test_a_new_fit_starts_over():
    stopping = EarlyStopping(patience=1)
    for _ in range(2):
        callbacks = [scripted("val_loss", [1.0, 2.0, 3.0]), stopping]
        history = trainer_of().fit(ramp(1), ramp(1), epochs=3, callbacks=callbacks, verbose=0)
        assert history.epoch == [0, 1]
        assert stopping.best == 1.0


def test_a_new_fit_waits_anew_and_looks_for_the_monitor_anew():
    stopping = EarlyStopping(patience=3)
    for values in ([1.0, 2.0, 2.0], [NAN, NAN, 5.0]):
        callbacks = [scripted("val_loss", values), stopping]
        history = trainer_of().fit(ramp(1), ramp(1), epochs=3, callbacks=callbacks, verbose=0)
        assert history.epoch == [0, 1, 2]
    with pytest.raises(UnknownMonitorError):
        trainer_of().fit(ramp(1), epochs=3, callbacks=stopping, verbose=0)


def test_its_texts_count_epochs_from_one(capsys):
    run([1.0, 2.0], restore_best_weights=True, verbose=1)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 2: early stopping",
        "Restoring model weights from the best epoch: 1.",
    ]
    run([1.0, 2.0])
    assert capsys.readouterr().out == ""


def test_its_state_goes_through_json_and_arrays_and_a_new_patience_wins():
    first, _ = run([1.0, 2.0, 3.0], patience=9, restore_best_weights=True)
    state = first.state_dict()
    weights = state.pop("best_weights")
    assert all(isinstance(array, mx.array) for array in weights.values())
    state = json.loads(json.dumps(state)) | {"best_weights": weights}
    second = EarlyStopping(patience=3, restore_best_weights=True)
    callbacks = [
        scripted("val_loss", [4.0, 5.0]),
        second,
    ]
    trainer = trainer_of()
    resume = Do("on_train_begin", lambda _: second.load_state_dict(state))
    callbacks.append(resume)
    history = trainer.fit(ramp(1), ramp(1), epochs=2, callbacks=callbacks, verbose=0)
    assert history.epoch == [0]
    assert (second.best, second.best_epoch, second.wait) == (1.0, 0, 3)
    assert mx.array_equal(trainer.model.weight, weights["weight"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"monitor": None}, r"EarlyStopping\(monitor=None\)"),
        ({"min_delta": "small"}, "EarlyStopping: min_delta='small'"),
        ({"patience": -1}, "EarlyStopping: patience=-1"),
        ({"patience": 1.5}, "EarlyStopping: patience=1.5"),
        ({"mode": "lowest"}, r"EarlyStopping\(mode='lowest'\); expected 'auto', 'min' or 'max'"),
        ({"baseline": "0.5"}, "EarlyStopping: baseline='0.5'"),
        ({"baseline": float("nan")}, "EarlyStopping: baseline=nan"),
        ({"patience": True}, "EarlyStopping: patience=True"),
        ({"min_delta": True}, "EarlyStopping: min_delta=True"),
        ({"restore_best_weights": "yes"}, "EarlyStopping: restore_best_weights='yes'"),
        ({"start_from_epoch": -1}, "EarlyStopping: start_from_epoch=-1"),
    ],
)
def test_a_wrong_argument_is_named(options, says):
    with pytest.raises(ConfigurationError, match=says):
        EarlyStopping(**options)


def test_layers_in_a_dict_with_digits_for_keys_are_restored():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = {"0": nn.Linear(4, 3), "1": nn.Linear(3, 3)}

        def __call__(self, x):
            return self.heads["1"](self.heads["0"](x))

    trainer = trainer_of(Heads())
    callback = EarlyStopping("loss", restore_best_weights=True, patience=5)
    trainer.fit(rows_of_ones(), epochs=3, callbacks=callback, verbose=0)
    assert callback.best_epoch == 2


def test_weights_restored_in_a_thread_serve_in_another():
    trainer = trainer_of(nn.Linear(4, 3))
    callback = EarlyStopping("loss", restore_best_weights=True, patience=5)
    run = threading.Thread(
        target=lambda: trainer.fit(rows_of_ones(), epochs=3, callbacks=callback, verbose=0)
    )
    run.start()
    run.join()
    assert trainer.predict(np.ones((2, 4), np.float32), verbose=0).shape == (2, 3)
