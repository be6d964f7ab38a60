"""Hugging Face's own datasets, through their own ``__getitems__``, compared with what they hold."""

import json
from itertools import chain

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer
from mlx_fit.data import DataLoader, Map, MapBatches, Subset, open_table, order, random_split
from mlx_fit.errors import DataError

pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

N = 11


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict(
        {
            "text": [f"row {i}" for i in range(N)],
            "x": [[i / 2, 1.0] for i in range(N)],
            "y": list(range(N)),
        }
    )


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_batches_are_the_rows_in_our_order(rows, kind):
    batches = list(DataLoader(rows.with_format(kind), 4, shuffle=True, seed=5))
    wanted = order(5, 0, N).tolist()
    assert [len(batch["y"]) for batch in batches] == [4, 4, 3]
    assert np.concatenate([batch["y"] for batch in batches]).tolist() == wanted
    assert list(chain(*(batch["text"] for batch in batches))) == [f"row {i}" for i in wanted]
    x = np.concatenate([batch["x"] for batch in batches])
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [[i / 2, 1] for i in wanted])


def test_a_batch_is_one_call_of_getitems(rows, monkeypatch):
    asked = []
    whole = datasets.Dataset.__getitems__
    monkeypatch.setattr(
        datasets.Dataset, "__getitems__", lambda self, keys: asked.append(keys) or whole(self, keys)
    )
    list(DataLoader(rows, 4))
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_what_is_selected_filtered_and_split_stays_right(rows):
    odd = rows.filter(lambda row: row["y"] % 2 == 1).select([3, 0, 1])
    assert next(iter(DataLoader(odd, 3)))["y"].tolist() == [7, 1, 3]
    assert next(iter(DataLoader(Subset(rows, [9, 2]), 2)))["text"] == ["row 9", "row 2"]
    parts = random_split(rows, [8, 3], seed=0)
    seen = [b["y"].tolist() for part in parts for b in DataLoader(part, 8)]
    assert sorted(chain(*seen)) == list(range(N))


def test_rows_and_batches_are_transformed(rows):
    pairs = Map(rows, lambda row, rng: (np.float32(row["x"]), row["y"]))
    x, y = next(iter(DataLoader(pairs, 2)))
    assert (x.tolist(), y.tolist()) == ([[0, 1], [0.5, 1]], [0, 1])
    batches = MapBatches(rows.with_format("numpy"), lambda b, rng: b["x"].sum(1))
    assert next(iter(DataLoader(batches, 3))).tolist() == [1, 1.5, 2]


def test_worker_processes_read_the_same(rows):
    loaders = (DataLoader(rows, 4, shuffle=True, num_workers=n, seed=1) for n in (0, 2))
    one, two = ([batch["y"].tolist() for batch in loader] for loader in loaders)
    assert one == two


def test_an_iterable_dataset_resumes_by_its_own_state(rows):
    def make():
        return DataLoader(rows.to_iterable_dataset(num_shards=2), 3)

    loader = make()
    iterator = iter(loader)
    assert next(iterator)["y"].tolist() == [0, 1, 2]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)  # without a warning: nothing is read and discarded
    assert [batch["y"].tolist() for batch in resumed] == [[3, 4, 5], [6, 7, 8], [9, 10]]
    assert next(iter(resumed))["y"].tolist() == [0, 1, 2]


def test_a_shuffled_iterable_dataset_is_told_the_epoch(rows):
    shuffled = rows.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=8)
    loader = DataLoader(shuffled, N)
    epochs = [batch["y"].tolist() for _ in range(2) for batch in loader]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(N))


def test_fit_takes_a_dataset_of_rows(rows):
    columns = rows.remove_columns("text").with_format("numpy")
    data = MapBatches(columns, lambda batch, rng: (batch["x"], np.float32(batch["y"])[:, None]))
    trainer = Trainer(nn.Linear(2, 1), optim.SGD(0.01), "mse")
    losses = trainer.fit(data, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_the_files_they_write_are_opened_mapped(rows, tmp_path):
    rows.save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    table = open_table(path)
    rows.to_parquet(tmp_path / "rows.parquet")
    for opened in (table, open_table(tmp_path / "rows.parquet")):
        assert opened.__getitems__([7, 2])["x"].tolist() == [[3.5, 1], [1, 1]]


def test_columns_are_arrays_once_they_are_read(rows):
    with pytest.raises(DataError, match=r"column of a Hugging Face dataset pass column\[:\]"):
        DataLoader((rows["x"], rows["y"]))
    x, y = next(iter(DataLoader((rows["x"][:], rows["y"][:]), 2)))
    assert (x.tolist(), y.tolist()) == ([[0, 1], [0.5, 1]], [0, 1])
