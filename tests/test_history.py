"""``History``."""

import csv
import math
import sys

import pytest
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
