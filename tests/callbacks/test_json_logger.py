"""JSONLogger, and what CSVLogger and it do on resume."""

import csv
import errno
import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from toys import Do, batch_of, raising, ramp, trainer_of

from mlx_fit import (
    ConfigurationError,
    CSVLogger,
    GradientMonitor,
    JSONLogger,
    LambdaCallback,
    TerminateOnNaN,
    metrics,
)
from mlx_fit.callbacks.as_json import as_json


def rows_of(path, event=None):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if event in (None, row["event"])]


def fit(logger, val=None, trainer=None, **options):
    options = {"epochs": 2, "callbacks": logger, "verbose": 0} | options
    return (trainer or trainer_of()).fit(ramp(2), val, **options)


def test_a_line_for_each_epoch_and_each_evaluation(tmp_path):
    path = tmp_path / "log.jsonl"
    history = fit(JSONLogger(path), ramp(1))
    assert [row["event"] for row in rows_of(path)] == ["evaluation", "epoch"] * 2
    epochs, evaluations = rows_of(path, "epoch"), rows_of(path, "evaluation")
    assert [row["epoch"] for row in epochs] == [0, 1]
    assert [row["step"] for row in evaluations] == [2, 4]
    for key, values in history.history.items():
        assert [row[key] for row in epochs] == values
    assert [row["val_mae"] for row in evaluations] == history.history["val_mae"]


def test_evaluations_inside_epochs_have_their_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    fit(JSONLogger(path), ramp(1), validation_freq="1 steps")
    assert [row["step"] for row in rows_of(path, "evaluation")] == [1, 2, 3, 4]


def test_rows_are_there_as_soon_as_they_happen_and_stay_after_an_error(tmp_path):
    path, counts = tmp_path / "a" / "b" / "log.jsonl", []
    look = Do("on_epoch_end", lambda _: counts.append(len(rows_of(path))))
    breaks = Do("on_epoch_end", raising(OSError("x")), 1)
    with pytest.raises(OSError, match="x"):
        fit([JSONLogger(path), look, breaks], epochs=3)
    assert counts == [1, 2]
    assert len(rows_of(path)) == 2
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_dicts_and_matrices_are_written_and_nan_is_null(tmp_path):
    path = tmp_path / "log.jsonl"
    adds = LambdaCallback(on_epoch_end=lambda e, logs: logs.update(a=np.float32(0.5), b=mx.eye(2)))
    fit([adds, GradientMonitor(), JSONLogger(path)], epochs=1)
    (row,) = rows_of(path)
    assert (row["a"], row["b"]) == (0.5, [[1, 0], [0, 1]])
    assert set(row["layer_grad_norms"]) == {"weight"}
    data = [batch_of(1), batch_of(math.nan)]
    options = {"callbacks": [TerminateOnNaN(), JSONLogger(path)], "verbose": 0}
    trainer_of().fit(data, **options)
    assert rows_of(path)[0]["loss"] is None
    assert "NaN" not in path.read_text()


def test_a_confusion_matrix_is_a_nested_list(tmp_path):
    path = tmp_path / "log.jsonl"
    trainer = trainer_of(loss="cross_entropy", metrics=[metrics.ConfusionMatrix()])
    data = (np.ones((6, 4), np.float32), np.arange(6) % 3)
    trainer.fit(data, callbacks=JSONLogger(path), verbose=0)
    assert np.sum(rows_of(path)[0]["confusion_matrix"]) == 6


def test_what_json_cannot_hold_is_named(tmp_path):
    adds = LambdaCallback(on_epoch_end=lambda e, logs: logs.update(thing=object()))
    with pytest.raises(ConfigurationError, match="The logs hold a object"):
        fit([adds, JSONLogger(tmp_path / "log.jsonl")])


def test_numbers_of_all_kinds_become_jsons():
    values = {"i": np.int64(3), "t": True, "n": np.bool_(False), "x": (1, mx.array(2.5)), "s": "a"}
    assert as_json(values) == {"i": 3, "t": True, "n": False, "x": [1, 2.5], "s": "a"}
    assert as_json([math.inf, -math.inf, None]) == [None, None, None]


def test_a_new_fit_starts_a_new_file_and_append_keeps_it(tmp_path):
    path = tmp_path / "log.jsonl"
    for append, epochs in ((False, [0, 1]), (False, [0, 1]), (True, [0, 1, 0, 1])):
        fit(JSONLogger(path, append=append))
        assert [row["epoch"] for row in rows_of(path)] == epochs


def test_a_run_that_goes_on_writes_no_epoch_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    fit(JSONLogger(path), ramp(1), epochs=4)
    fit(JSONLogger(path, append=True), ramp(1), initial_epoch=2, epochs=5)
    assert [row["epoch"] for row in rows_of(path, "epoch")] == [0, 1, 2, 3, 4]
    assert [row["epoch"] for row in rows_of(path, "evaluation")] == [0, 1, 2, 3, 4]


def test_half_a_line_of_a_killed_process_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    fit(JSONLogger(path))
    path.write_text(path.read_text() + '{"event": "ep')
    fit(JSONLogger(path, append=True), epochs=3, initial_epoch=2)
    assert [row["epoch"] for row in rows_of(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "text", ["name,age\n", '{"name": 1}\n', "[1]\n", "3\n", '{"epoch": "1"}\n']
)
def test_append_to_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="line 1 of"):
        fit(JSONLogger(path, append=True))
    assert path.read_text() == text


def csv_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("kind", [JSONLogger, CSVLogger])
def test_a_resumed_run_has_each_row_once(tmp_path, kind, append):
    path, read = tmp_path / "log", csv_rows if kind is CSVLogger else rows_of
    whole, states = kind(path, append=append), []
    keep = Do("on_epoch_end", lambda _: states.append(json.dumps(whole.state_dict())), 1)
    fit([whole, keep], ramp(1), epochs=4)
    expected = read(path)
    resumed, trainer = kind(path, append=append), trainer_of()
    fit([], ramp(1), trainer=trainer)
    load = Do("on_train_begin", lambda _: resumed.load_state_dict(json.loads(states[0])))
    fit([resumed, load], ramp(1), trainer, initial_epoch=2, epochs=4)
    assert read(path) == expected
    assert len({json.dumps(row) for row in expected}) == len(expected)


@pytest.mark.parametrize("kind", [JSONLogger, CSVLogger])
def test_a_row_that_cannot_be_written_is_said_once_and_comes_with_the_next(tmp_path, kind):
    """Its folder is gone for two epochs, and a file stands there; the run goes on."""
    folder, read = tmp_path / "logs", csv_rows if kind is CSVLogger else rows_of

    def block(run):
        if run.epoch == 1:
            shutil.rmtree(folder)
            folder.write_text("in the way")
        if run.epoch == 3:
            folder.unlink()

    callback = kind(folder / "log")
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        fit([Do("on_epoch_begin", block), callback], epochs=5)
    assert len(caught) == 1
    assert [int(row["epoch"]) for row in read(callback.path)] == [0, 1, 2, 3, 4]
    assert [path.name for path in folder.iterdir()] == ["log"]


@pytest.mark.parametrize("kind", [JSONLogger, CSVLogger])
def test_a_full_disk_leaves_no_half_file(tmp_path, kind, monkeypatch):
    callback, write_all = kind(tmp_path / "log"), kind._write_all

    def full(self, file):
        write_all(self, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    fit([callback], epochs=2)
    before = callback.path.read_bytes()
    monkeypatch.setattr(kind, "_write_all", full)
    with pytest.raises(OSError, match="No space left"):
        fit([kind(tmp_path / "log", append=True)], epochs=3, initial_epoch=2)
    assert callback.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(("path", "append", "says"), [(None, False, "path="), ("a", 1, "append=")])
def test_wrong_arguments_are_named(path, append, says):
    with pytest.raises(ConfigurationError, match=f"JSONLogger: {says}"):
        JSONLogger(path, append)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="is a folder"):
        JSONLogger(tmp_path)
