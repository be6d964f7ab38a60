"""``History``."""

import csv
import math
import sys

import pytest
from matplotlib import pyplot
from toys import ramp, trainer_of

from mlx_fit import ConfigurationError, History


def history_of(*rows, higher=None):
    history = History({"epochs": len(rows)}, lambda key: higher)
    for epoch, row in rows:
        history.append(epoch, row)
    return history


def test_keys_may_be_missing_in_some_epochs():
    history = history_of((0, {"loss": 3.0}), (1, {"loss": 2.0, "val_loss": 5.0}))
    assert history.history == {"loss": [3.0, 2.0], "val_loss": [5.0]}
    assert history.epoch == [0, 1]


@pytest.mark.parametrize(("higher", "best"), [(False, (4, 1.0)), (True, (3, 3.0))])
def test_best_gives_the_epoch_and_the_value_by_the_metrics_direction(higher, best):
    rows = (2, {"a": math.nan}), (3, {"a": 3.0}), (4, {"a": 1.0}), (5, {}), (6, {"a": 1.0})
    assert history_of(*rows, higher=higher).best("a") == best


def test_best_takes_a_mode_that_wins():
    history = history_of((0, {"a": 1.0}), (1, {"a": 2.0}), higher=False)
    assert history.best("a", mode="max") == (1, 2.0)


def test_best_says_what_is_wrong():
    history = history_of((0, {"loss": 1.0}))
    with pytest.raises(ConfigurationError, match="no 'val_loss'; it has loss"):
        history.best("val_loss")
    with pytest.raises(ConfigurationError, match="give mode="):
        history.best("loss")
    with pytest.raises(ConfigurationError, match="expected 'auto', 'min' or 'max'"):
        history.best("loss", mode="lowest")
    with pytest.raises(ConfigurationError, match="'matrix' holds no numbers"):
        history_of((0, {"matrix": [[1.0]]})).best("matrix", mode="max")


def test_best_asks_the_trainers_metrics():
    history = trainer_of().fit(ramp(2), ramp(2), epochs=3, verbose=0)
    assert history.best("val_mae") == (2, history.history["val_mae"][2])
    assert history.best("loss")[0] == 2


def test_csv_leaves_missing_values_empty(tmp_path):
    history = history_of((3, {"loss": 3.0}), (4, {"loss": 2.5, "val_loss": 5.0}))
    history.to_csv(tmp_path / "deep" / "h.csv")
    with (tmp_path / "deep" / "h.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["epoch", "loss", "val_loss"], ["3", "3.0", ""], ["4", "2.5", "5.0"]]


def test_plotting_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        history_of((0, {"loss": 1.0})).plot()


def test_its_repr_shows_the_last_values():
    assert repr(history_of((0, {"loss": 3.0}), (1, {"loss": 2.0}))) == (
        "History(2 epochs, last {'loss': 2.0})"
    )
    assert repr(history_of()) == "History(0 epochs, last {})"


def test_its_table_has_the_last_and_the_best_of_every_number():
    rows = (0, {"loss": 3.0, "m": [[1.0]]}), (1, {"loss": 1.0, "val_loss": 2.0}), (2, {"loss": 2.5})
    lines = history_of(*rows, higher=False).table().split("\n")
    assert [line.split() for line in lines] == [
        ["3", "epochs", "last", "best", "epoch"],
        ["loss", "2.5", "1", "1"],
        ["val_loss", "2", "2", "1"],
    ]
    assert len({line.rstrip().rfind(" ") for line in lines[1:]}) == 1  # columns stand in line


def test_its_table_leaves_the_best_empty_where_no_direction_is_known():
    history = history_of((0, {"rate": math.nan}), (1, {"rate": 0.123456789}))
    history.stopped_by = "SIGINT"
    assert str(history) == "2 epochs     last  best  epoch\nrate      0.12346\nstopped by SIGINT"
    assert str(history_of()) == "0 epochs  last  best  epoch"
    assert str(history_of((4, {"a": 1}))).startswith("1 epoch ")


def test_the_table_of_a_fit_knows_the_directions_of_its_metrics():
    history = trainer_of().fit(ramp(2), ramp(2), epochs=3, verbose=0)
    found = {line.split()[0]: line.split()[1:] for line in str(history).split("\n")[1:]}
    epoch, best = history.best("val_mae")
    assert found["val_mae"] == [f"{history.last['val_mae']:.5g}", f"{best:.5g}", str(epoch)]
    assert len(found["learning_rate"]) == 1


def test_its_rows_are_copies_with_the_keys_of_each_epoch():
    history = history_of((0, {"loss": 3.0}), (1, {"loss": 2.0, "val_loss": 5.0}))
    history.rows[0]["loss"] = 0.0
    assert history.rows == [{"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 2.0, "val_loss": 5.0}]


def test_a_plot_leaves_out_what_is_no_curve():
    history = history_of((0, {"loss": 3.0, "matrix": [[1.0, 2.0]]}), (1, {"loss": 2.0}))
    pyplot.switch_backend("agg")
    figure = history.plot()
    assert [axis.get_legend_handles_labels()[1] for axis in figure.axes] == [["loss"]]
    pyplot.close(figure)
    with pytest.raises(ConfigurationError, match="no numbers to plot"):
        history_of().plot()
