"""ModelCheckpoint for weights."""

import json
import math
import os
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toys import Do, Recorder, batch_of, ramp, rows_of_ones, scripted, trainer_of, weight_of

from mlx_fit import (
    CheckpointWriteError,
    ConfigurationError,
    ModelCheckpoint,
    NonFiniteLossError,
    TerminateOnNaN,
    UnknownMonitorError,
)
from mlx_fit.callbacks import model_checkpoint


def fit(checkpoint, num_batches=1, epochs=1, before=(), trainer=None, **options):
    trainer = trainer or trainer_of()
    callbacks = [*before, checkpoint]
    options = {"verbose": 0} | options
    trainer.fit(ramp(num_batches), ramp(1), epochs=epochs, callbacks=callbacks, **options)
    return trainer


def with_values(path, values, **options):
    """A checkpoint of the best, run over epochs with these values of val_loss."""
    checkpoint = ModelCheckpoint(path, save_best_only=True, **options)
    before = [scripted(checkpoint.monitor, values)]
    fit(checkpoint, epochs=len(values), before=before)
    return checkpoint


def names(folder):
    return sorted(os.listdir(folder))


def weights(path):
    return mx.load(str(path))["weight"][0, 0].item()


def test_weights_are_saved_each_epoch_into_a_new_folder(tmp_path):
    path, seen = tmp_path / "new" / "w.safetensors", []
    watch = Do("on_epoch_end", lambda _: seen.append(weights(path)))
    checkpoint = ModelCheckpoint(path)
    trainer = trainer_of()
    trainer.fit(ramp(2), epochs=2, callbacks=[checkpoint, watch], verbose=0)
    assert seen[0] != seen[1] == weight_of(trainer)
    assert checkpoint.last_path == path


def test_the_file_loads_into_a_fresh_model(tmp_path):
    path = tmp_path / "w.safetensors"
    trainer = fit(ModelCheckpoint(path), trainer=trainer_of(nn.Linear(4, 3)))
    fresh = trainer_of(nn.Linear(4, 3))
    fresh.load_weights(path)
    assert mx.array_equal(fresh.model.weight, trainer.model.weight)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{epoch:02d}.safetensors", ["01.safetensors", "02.safetensors"]),
        ("{epoch}-{step}.safetensors", ["1-3.safetensors", "2-6.safetensors"]),
        ("{epoch}-{val_loss:.1f}.safetensors", ["1-0.5.safetensors", "2-0.2.safetensors"]),
        ("{{x}}.safetensors", ["{x}.safetensors"]),
    ],
)
def test_names_are_filled_in(tmp_path, template, expected):
    checkpoint = ModelCheckpoint(tmp_path / template)
    fit(checkpoint, num_batches=3, epochs=2, before=[scripted("val_loss", [0.5, 0.25])])
    assert names(tmp_path) == expected


def test_an_unknown_field_raises_at_the_first_save_and_lists_the_keys(tmp_path):
    with pytest.raises(ConfigurationError, match=r"names val_los; available here: .*val_loss"):
        fit(ModelCheckpoint(tmp_path / "{val_los}.safetensors"), epochs=3)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("save_freq", "epochs", "expected"),
    [
        (15, 10, ["03-05", "06-05", "09-05"]),
        (3, 3, ["01-03", "02-01", "02-04", "03-02", "03-05"]),
        (5, 2, ["01-05", "02-05"]),
    ],
)
def test_a_frequency_in_steps_spans_epochs(tmp_path, save_freq, epochs, expected):
    path = tmp_path / "{epoch:02d}-{batch:02d}.safetensors"
    fit(ModelCheckpoint(path, save_freq=save_freq), num_batches=5, epochs=epochs)
    assert names(tmp_path) == [f"{name}.safetensors" for name in expected]


def test_steps_are_windows_and_each_is_saved_once(tmp_path):
    path = tmp_path / "{epoch}-{batch}-{step}.safetensors"
    checkpoint = ModelCheckpoint(path, save_freq=1)
    fit(checkpoint, num_batches=5, epochs=2, trainer=trainer_of(gradient_accumulation=2))
    stems = ["1-2-1", "1-4-2", "1-5-3", "2-2-4", "2-4-5", "2-5-6"]
    assert names(tmp_path) == [f"{stem}.safetensors" for stem in stems]


def test_a_window_that_the_end_of_an_epoch_closes_is_saved_with_its_epoch(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{batch}-{step}.safetensors", save_freq=3)
    trainer = trainer_of(gradient_accumulation=2)
    trainer.fit(lambda: iter(ramp(5)), epochs=2, callbacks=checkpoint, verbose=0)
    assert names(tmp_path) == ["1-5-3.safetensors", "2-5-6.safetensors"]


def test_only_improvements_are_saved(tmp_path):
    path = tmp_path / "{epoch}.safetensors"
    checkpoint = with_values(path, [3.0, 4.0, 2.0, 2.0, math.nan, 0.0, 1.0])
    assert names(tmp_path) == ["1.safetensors", "3.safetensors", "6.safetensors"]
    assert checkpoint.best == 0.0


def test_without_it_every_epoch_is_saved(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.safetensors")
    fit(checkpoint, epochs=3, before=[scripted("val_loss", [1.0, 2.0, 3.0])])
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    ("options", "value", "is_saved"),
    [
        ({"initial_value_threshold": 0.0}, 0.1, False),
        ({"initial_value_threshold": -0.01, "mode": "max"}, 0.1, True),
        ({}, 0.1, True),
        ({"initial_value_threshold": 1.0, "monitor": "val_mae", "mode": "max"}, 0.9, False),
        ({}, math.nan, False),
        ({}, 0.0, True),
    ],
)
def test_the_first_value_must_beat_the_threshold(tmp_path, options, value, is_saved):
    with_values(tmp_path / "w.safetensors", [value], **options)
    assert bool(names(tmp_path)) == is_saved


def test_the_best_persists_over_fits(tmp_path):
    checkpoint = with_values(tmp_path / "{epoch}.safetensors", [1.0])
    fit(checkpoint, epochs=3, before=[scripted("val_loss", [2.0, 1.0, 0.5])])
    assert names(tmp_path) == ["1.safetensors", "3.safetensors"]


def test_evaluations_inside_epochs_are_each_considered(tmp_path):
    path = tmp_path / "{epoch}-{step}.safetensors"
    checkpoint = ModelCheckpoint(path, save_best_only=True)
    fit(checkpoint, num_batches=4, epochs=2, validation_freq="2 steps", trainer=trainer_of())
    assert "1-2.safetensors" in names(tmp_path)
    assert len(names(tmp_path)) <= 4


def test_an_unused_monitor_is_not_checked(tmp_path):
    fit(ModelCheckpoint(tmp_path / "w.safetensors", monitor="nonsense"))
    assert names(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("save_freq", ["epoch", 2])
def test_a_misspelt_monitor_raises_after_the_first_epoch(tmp_path, save_freq):
    checkpoint = ModelCheckpoint(
        tmp_path / "w.safetensors", "los", save_best_only=True, mode="min", save_freq=save_freq
    )
    with pytest.raises(UnknownMonitorError, match=r"ModelCheckpoint monitors 'los'.*loss, mae"):
        fit(checkpoint, num_batches=4, epochs=3)


def test_the_running_loss_can_be_watched_by_steps(tmp_path):
    path = tmp_path / "{epoch}-{batch}.safetensors"
    checkpoint = ModelCheckpoint(path, "loss", save_best_only=True, save_freq=2)
    data = [batch_of(v) for v in (2, 2, 1, 1, 3, 3)]
    trainer_of(learning_rate=0.0).fit(data, epochs=2, callbacks=checkpoint, verbose=0)
    assert names(tmp_path) == ["1-2.safetensors", "1-4.safetensors"]
    assert checkpoint.best == 40.0


def test_keep_removes_the_oldest_after_the_newest_is_safe(tmp_path, monkeypatch):
    before_removal = []
    remove = model_checkpoint._remove
    monkeypatch.setattr(
        model_checkpoint,
        "_remove",
        lambda path: (before_removal.append(names(tmp_path)), remove(path)),
    )
    fit(ModelCheckpoint(tmp_path / "{epoch:02d}.safetensors", keep=2), epochs=12)
    assert names(tmp_path) == ["11.safetensors", "12.safetensors"]
    assert {len(found) for found in before_removal} == {3}


def test_keep_never_removes_a_name_that_was_written_again(tmp_path):
    fit(ModelCheckpoint(tmp_path / "w.safetensors", keep=1), epochs=3)
    assert names(tmp_path) == ["w.safetensors"]


def test_an_old_file_that_cannot_be_removed_ends_nothing(tmp_path):
    (tmp_path / "1.safetensors").mkdir()
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.safetensors", keep=1)
    state = checkpoint.state_dict() | {"written": [str(tmp_path / "1.safetensors")]}
    resume = Do("on_train_begin", lambda _: checkpoint.load_state_dict(state))
    with pytest.warns(UserWarning, match="could not be removed"):
        fit(checkpoint, epochs=3, before=[resume], initial_epoch=1)
    assert names(tmp_path) == ["1.safetensors", "3.safetensors"]


def test_a_target_that_is_a_directory_is_named(tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(CheckpointWriteError, match=r"w.safetensors is a directory") as caught:
        fit(ModelCheckpoint(tmp_path / "w.safetensors"))
    assert isinstance(caught.value, OSError)


def test_a_save_that_fails_raises(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointWriteError):
        fit(ModelCheckpoint(tmp_path / "file" / "w.safetensors"))


def test_non_finite_weights_are_never_written(tmp_path):
    trainer = trainer_of(nonfinite="ignore")
    with pytest.raises(NonFiniteLossError, match="weight"):
        trainer.fit(
            [batch_of(float("nan"))],
            callbacks=ModelCheckpoint(tmp_path / "w.safetensors"),
            verbose=0,
        )
    assert names(tmp_path) == []


def test_under_terminate_on_nan_the_last_good_file_stays(tmp_path):
    path = tmp_path / "w.safetensors"
    callbacks = [TerminateOnNaN(), ModelCheckpoint(path, save_freq=1)]
    data = [batch_of(1), batch_of(float("nan")), batch_of(1)]
    with pytest.warns(UserWarning, match="Not saved"):
        trainer_of().fit(data, callbacks=callbacks, verbose=0)
    assert math.isfinite(weights(path))


def test_its_texts_are_those_of_keras(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    with_values(path, [0.123454, 0.2, 0.1], verbose=1)
    assert capsys.readouterr().out.splitlines() == [
        f"Epoch 1: val_loss improved from None to 0.12345, saving model to {path}",
        "Epoch 2: val_loss did not improve from 0.12345",
        f"Epoch 3: val_loss improved from 0.12345 to 0.10000, saving model to {path}",
    ]
    fit(ModelCheckpoint(path, verbose=1))
    assert capsys.readouterr().out == f"Epoch 1: saving model to {path}\n"


def test_its_state_goes_through_json(tmp_path):
    first = with_values(tmp_path / "{epoch}.safetensors", [3.0, 2.0], keep=2)
    state = json.loads(json.dumps(first.state_dict()))
    second = ModelCheckpoint(tmp_path / "{epoch}.safetensors", save_best_only=True, keep=2)
    second.load_state_dict(state)
    before = [scripted("val_loss", [0, 0, 2.5, 1.0])]
    fit(second, epochs=4, initial_epoch=2, before=before)
    assert names(tmp_path) == ["2.safetensors", "4.safetensors"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"filepath": "w.npz"}, r"ends with .safetensors"),
        ({"filepath": "{epoch.safetensors"}, r"ModelCheckpoint\('{epoch.safetensors'\)"),
        ({"filepath": "{}.safetensors"}, "a field has no name"),
        ({"save_freq": "x"}, r"save_freq='x'\); expected 'epoch' or a positive number"),
        ({"save_freq": 1.5}, r"save_freq=1.5"),
        ({"save_freq": 0}, r"save_freq=0"),
        ({"mode": "best"}, r"mode='best'"),
        ({"monitor": 3}, r"monitor=3"),
        ({"keep": 0}, r"keep=0"),
        ({"keep": True}, r"keep=True"),
        ({"save_freq": True}, r"save_freq=True"),
        ({"save_best_only": "val_loss"}, "save_best_only='val_loss'; expected True or False"),
        ({"initial_value_threshold": "x"}, "initial_value_threshold='x'"),
        ({"initial_value_threshold": math.nan}, "initial_value_threshold=nan"),
        ({"filepath": 3}, "filepath=3; expected a path"),
        ({"filepath": ""}, "filepath is empty"),
        ({"save_weights_only": False}, "holds weights only"),
        ({"save_freq": 5, "save_best_only": True}, "Use save_freq='epoch'"),
    ],
)
def test_a_wrong_argument_is_named_at_construction(options, says):
    with pytest.raises(ConfigurationError, match=says):
        ModelCheckpoint(**({"filepath": "w.safetensors"} | options))


def test_numpys_integers_are_integers(tmp_path):
    fit(ModelCheckpoint(tmp_path / "{step}.safetensors", save_freq=np.int64(2)), num_batches=4)
    assert names(tmp_path) == ["2.safetensors", "4.safetensors"]


@pytest.mark.parametrize("path", ["{epoch:zz}", "{val_loss:d}", "{epoch.real.x}", "{batch[0]}"])
def test_a_format_that_cannot_work_is_told_at_once(path):
    with pytest.raises(ConfigurationError, match="whole numbers"):
        ModelCheckpoint(f"{path}.safetensors")


def test_the_batch_of_an_epochs_end_is_its_last(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{batch}.safetensors")
    trainer_of().fit(rows_of_ones(10), epochs=2, verbose=0, callbacks=checkpoint)
    assert names(tmp_path) == ["1-3.safetensors", "2-3.safetensors"]


def test_others_hear_of_its_saves_once_and_their_time_is_not_that_of_training(tmp_path):
    heard, looks = Recorder(), []
    slow = Do("on_save_begin", lambda run: time.sleep(0.05))
    begin = Do("on_epoch_begin", lambda run: looks.append(time.perf_counter()))
    end = Do("on_epoch_end", lambda run: looks.extend([time.perf_counter(), run.pace.seconds]))
    saves = ModelCheckpoint(tmp_path / "w.safetensors", save_freq=2)
    callbacks = [heard, saves, slow, begin, end]
    trainer_of().fit(ramp(4), callbacks=callbacks, verbose=0, checkpoint_dir=tmp_path / "all")
    assert heard.names.count("save_begin") == heard.names.count("save_end") == 3
    assert heard.names.index("save_begin") < heard.names.index("epoch_end")
    start, stop, seconds = looks
    assert seconds <= stop - start - 0.1


def test_a_callback_that_saves_when_told_of_a_save_is_not_told_of_its_own(tmp_path):
    heard = Recorder()
    again = Do("on_save_begin", lambda run: run.save_weights(tmp_path / "again.safetensors"))
    saves = ModelCheckpoint(tmp_path / "w.safetensors")
    trainer_of().fit(ramp(2), callbacks=[heard, saves, again], verbose=0)
    assert heard.names.count("save_begin") == 1
    assert (tmp_path / "again.safetensors").exists()
