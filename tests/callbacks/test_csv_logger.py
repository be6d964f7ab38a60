"""CSVLogger."""

import csv
import math

import numpy as np
import pytest
from toys import Do, batch_of, raising, ramp, rows_of_ones, scripted, trainer_of

from mlx_fit import ConfigurationError, CSVLogger, LambdaCallback, TerminateOnNaN


def rows_of(path, separator=","):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


def fit(logger, val=None, trainer=None, **options):
    options = {"epochs": 2, "callbacks": logger, "verbose": 0} | options
    return (trainer or trainer_of()).fit(ramp(2), val, **options)


def test_a_row_per_epoch_holds_exactly_the_history(tmp_path):
    path = tmp_path / "log.csv"
    history = fit(CSVLogger(path), ramp(1), epochs=3)
    rows = rows_of(path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [float(row["val_mae"]) for row in rows] == history.history["val_mae"]
    assert list(rows[0]) == ["epoch", "loss", "mae", "learning_rate", "val_loss", "val_mae"] or set(
        rows[0]
    ) == {"epoch", *history.history}


def test_validation_columns_exist_from_the_start_and_are_empty_without_a_value(tmp_path):
    path, headers = tmp_path / "log.csv", []
    look = Do("on_epoch_end", lambda _: headers.append(path.read_text().splitlines()[0]))
    fit([CSVLogger(path), look], ramp(1), epochs=5, validation_freq=3)
    assert len(set(headers)) == 1
    assert "val_loss" in headers[0]
    assert [row["val_loss"] != "" for row in rows_of(path)] == [False, False, True, False, False]


def test_columns_of_several_sets_exist_from_the_start(tmp_path):
    path = tmp_path / "log.csv"
    fit(CSVLogger(path), {"a": ramp(1), "b": ramp(1)}, epochs=1, validation_freq=2)
    assert {"val_a_loss", "val_b_mae"} <= set(rows_of(path)[0])
    assert "val_loss" not in rows_of(path)[0]


def test_without_validation_there_are_no_validation_columns(tmp_path):
    path = tmp_path / "log.csv"
    fit(CSVLogger(path))
    assert set(rows_of(path)[0]) == {"epoch", "loss", "mae", "learning_rate"}


def test_rows_are_there_as_soon_as_their_epoch_ends(tmp_path):
    path, counts = tmp_path / "log.csv", []
    look = Do("on_epoch_end", lambda _: counts.append(len(rows_of(path))))
    fit([CSVLogger(path), look], epochs=3)
    assert counts == [1, 2, 3]


def test_parent_folders_are_made(tmp_path):
    fit(CSVLogger(tmp_path / "a" / "b" / "log.csv"))
    assert len(rows_of(tmp_path / "a" / "b" / "log.csv")) == 2


def test_the_separator_is_used(tmp_path):
    path = tmp_path / "log.csv"
    fit(CSVLogger(path, separator=";"))
    assert len(rows_of(path, ";")[0]) == 4


def test_a_new_fit_starts_a_new_file(tmp_path):
    logger = CSVLogger(tmp_path / "log.csv")
    fit(logger, ramp(1), epochs=3)
    fit(logger)
    assert [row["epoch"] for row in rows_of(logger.path)] == ["0", "1"]
    assert "val_loss" not in rows_of(logger.path)[0]


def test_append_keeps_what_is_there(tmp_path):
    path = tmp_path / "log.csv"
    fit(CSVLogger(path))
    fit(CSVLogger(path, append=True), ramp(1))
    rows = rows_of(path)
    assert [row["epoch"] for row in rows] == ["0", "1", "0", "1"]
    assert [row["val_loss"] != "" for row in rows] == [False, False, True, True]


def test_a_run_that_goes_on_writes_no_epoch_twice(tmp_path):
    path = tmp_path / "log.csv"
    fit(CSVLogger(path), epochs=4)
    before = rows_of(path)
    fit(CSVLogger(path, append=True), initial_epoch=2, epochs=5)
    rows = rows_of(path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[:2] == before[:2]


def test_append_to_a_missing_or_empty_file_starts_one(tmp_path):
    path = tmp_path / "log.csv"
    for _ in range(2):
        path.write_text("") if path.exists() else None
        fit(CSVLogger(path, append=True))
        assert [row["epoch"] for row in rows_of(path)] == ["0", "1"]
        path.write_text("")


def test_append_to_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("name,age\na,3\n")
    with pytest.raises(ConfigurationError, match="its columns are name, age"):
        fit(CSVLogger(path, append=True))
    assert path.read_text() == "name,age\na,3\n"
    fit(CSVLogger(path, separator=";"))
    with pytest.raises(ConfigurationError, match="separator"):
        fit(CSVLogger(path, append=True))


def test_a_value_that_appears_later_gets_a_column(tmp_path):
    path = tmp_path / "log.csv"
    late = scripted("late", [None, None, 1.5])
    fit([late, CSVLogger(path)], epochs=3)
    assert [row["late"] for row in rows_of(path)] == ["", "", "1.5"]


def test_numpys_scalars_are_written_and_matrices_are_not(tmp_path):
    path = tmp_path / "log.csv"
    adds = LambdaCallback(
        on_epoch_end=lambda _, logs: logs.update(scalar=np.float32(0.5), matrix=[[1, 2]])
    )
    fit([adds, CSVLogger(path)])
    assert rows_of(path)[0]["scalar"] == "0.5"
    assert "matrix" not in rows_of(path)[0]


def test_a_loss_that_is_no_number_is_written_as_nan(tmp_path):
    path = tmp_path / "log.csv"
    data = [batch_of(1), batch_of(math.nan), batch_of(1)]
    options = {"epochs": 3, "callbacks": [TerminateOnNaN(), CSVLogger(path)], "verbose": 0}
    trainer_of().fit(data, **options)
    assert [row["loss"] for row in rows_of(path)] == ["nan"]


def test_what_was_written_stays_when_training_fails(tmp_path):
    path = tmp_path / "log.csv"
    breaks = Do("on_epoch_end", raising(OSError("x")), index=1)
    with pytest.raises(OSError, match="x"):
        fit([CSVLogger(path), breaks], epochs=3)
    assert len(rows_of(path)) == 2


def test_the_folder_holds_nothing_else(tmp_path):
    fit(CSVLogger(tmp_path / "log.csv"), rows_of_ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("separator", ["", "ab", None, "\n", '"'])
def test_a_separator_is_one_character(separator):
    with pytest.raises(ConfigurationError, match=r"expected one character"):
        CSVLogger("log.csv", separator=separator)


def test_append_is_true_or_false(tmp_path):
    with pytest.raises(ConfigurationError, match="CSVLogger: append="):
        CSVLogger(tmp_path / "log.csv", append="log.csv")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="is a folder"):
        CSVLogger(tmp_path)
