"""Arrow and Parquet tables, compared with what pyarrow itself says is in them."""

import json
import pickle
import warnings
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer
from mlx_fit.data import DataLoader, MapBatches, RowGroupSampler, Subset, open_table, order
from mlx_fit.errors import ConfigurationError, DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N = 23


def content(n=N, start=0):
    rows = range(start, start + n)
    return {
        "i": pa.array(rows, pa.int32()),
        "x": pa.array([i / 4 for i in rows], pa.float64()),
        "flag": pa.array([i % 3 == 0 for i in rows]),
        "vector": pa.array([[i, i + 0.5] for i in rows], pa.list_(pa.float32())),
        "grid": pa.array([[[i, 1], [2, 3]] for i in rows], pa.list_(pa.list_(pa.int64(), 2), 2)),
        "text": pa.array([f"row {i}é" for i in rows]),
        "bytes": pa.array([b"a\0" * (i % 2) for i in rows]),
        "kind": pa.array([("cat", "dog")[i % 2] for i in rows]).dictionary_encode(),
        "turns": pa.array([[{"role": "user", "n": i}] * (i % 3) for i in rows]),
    }


def write(kind, path, table, group=5):
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=group)
    elif kind == "table":
        return table
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    return path


KINDS = ["parquet", "file", "stream", "table"]


@pytest.fixture(params=KINDS)
def opened(request, tmp_path):
    return open_table(write(request.param, tmp_path / "rows", pa.table(content())), num_kept=5)


def test_batches_are_what_pyarrow_has_at_these_rows(opened):
    expected = pa.table(content()).to_pylist()
    loader = DataLoader(opened, 4, shuffle=True, seed=3)
    seen = []
    for batch in loader:
        rows = [expected[i] for i in batch["i"]]
        seen += batch["i"].tolist()
        assert list(batch) == list(expected[0])
        for name in ("i", "x", "flag", "vector", "grid"):
            np.testing.assert_array_equal(batch[name], [row[name] for row in rows])
        for name in ("text", "bytes", "kind", "turns"):
            assert batch[name] == [row[name] for row in rows]
    assert sorted(seen) == list(range(N))
    assert seen != sorted(seen)
    assert {name: str(batch[name].dtype) for name in ("i", "x", "flag", "vector", "grid")} == {
        "i": "int32", "x": "float32", "flag": "bool", "vector": "float32", "grid": "int64"
    }  # fmt: skip


def test_single_rows_count_from_both_ends(opened):
    assert (opened[-1]["i"], opened[2]["text"], opened[3]["vector"].tolist()) == (
        N - 1, "row 2é", [3, 3.5]
    )  # fmt: skip
    with pytest.raises(IndexError):
        opened[N]


def test_a_worker_opens_the_table_anew(opened):
    again = pickle.loads(pickle.dumps(opened))
    assert again.__getitems__([4, 1])["i"].tolist() == [4, 1]


def test_processes_give_the_same_batches(tmp_path):
    path = write("parquet", tmp_path / "rows", pa.table({"i": list(range(N))}))
    table = open_table(path, num_kept=5)
    batches = [
        [b["i"].tolist() for b in DataLoader(table, 4, True, num_workers=n, seed=1)] for n in (0, 2)
    ]
    assert batches[0] == batches[1]


def test_several_files_follow_each_other(tmp_path):
    for kind in ("parquet", "file"):
        paths = [
            write(kind, tmp_path / f"{kind}{part}", pa.table(content(4 + part, start=4 * part)))
            for part in range(3)
        ]
        rows = open_table(paths, columns=["i", "text"])
        assert rows.columns == ["i", "text"]
        assert rows.column("i").tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13]


def test_row_groups_are_decoded_once_an_epoch_with_their_sampler(tmp_path):
    path = write("parquet", tmp_path / "rows", pa.table({"i": list(range(100))}), group=10)
    table = open_table(path, num_kept=3)
    sampler = RowGroupSampler(table.group_sizes, 3, seed=1)
    loader = DataLoader(table, 7, sampler=sampler)
    first, second = ([b["i"].tolist() for b in loader] for _ in range(2))
    assert table._rows.num_decoded <= 2 * len(table.group_sizes)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(100))
    assert first != second
    assert len({i // 10 for i in first[0]}) > 1  # the rows of groups are mixed


def test_a_shuffled_epoch_resumes_where_it_was(tmp_path):
    path = write("parquet", tmp_path / "rows", pa.table({"i": list(range(50))}))

    def make():
        table = open_table(path)
        sampler = RowGroupSampler(table.group_sizes, seed=2)
        return DataLoader(table, 4, sampler=sampler, seed=0)

    whole = [b["i"].tolist() for b in make()]
    loader = make()
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert [b["i"].tolist() for b in resumed] == whole[5:]


def test_a_shuffle_that_decodes_everything_again_and_again_warns_once(tmp_path):
    path = write("parquet", tmp_path / "rows", pa.table({"i": list(range(100))}), group=2)
    loader = DataLoader(open_table(path, num_kept=2), 10, shuffle=True, seed=0)
    with pytest.warns(UserWarning, match=r"RowGroupSampler\(table.group_sizes\)") as warned:
        list(loader)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(DataLoader(open_table(path, num_kept=5), 10))


def test_decoded_groups_are_bounded(tmp_path):
    path = write("parquet", tmp_path / "rows", pa.table({"i": list(range(60))}))
    table = open_table(path, num_kept=2)
    for batch in DataLoader(table, 7):
        assert len(table._rows._kept) <= 2
        del batch
    assert table._rows.num_decoded == 12


def test_a_collate_fn_gets_rows_whose_lists_differ(tmp_path):
    ragged = pa.table({"tokens": [[1, 2, 3], [4], [], [5, 6]], "y": [0, 1, 2, 3]})
    for kind in KINDS:
        table = open_table(write(kind, tmp_path / kind, ragged))
        loader = DataLoader(table, 3, collate_fn=lambda rows: [r["tokens"].tolist() for r in rows])
        assert list(loader) == [[[1, 2, 3], [4], []], [[5, 6]]]
        with pytest.raises(DataError, match="Row 1: field 'tokens' has 1 entries, but in row 0"):
            list(DataLoader(table, 2))
    nested = open_table(pa.table({"t": [[[1, 2], [3, 4]], [[5, 6]]]}))
    assert [r["t"].tolist() for r in nested.rows([1, 0])] == [[[5, 6]], [[1, 2], [3, 4]]]


def test_nulls_are_named_or_filled_as_missing_says(tmp_path):
    table = pa.table({"a": [1, None, 3], "b": [0.5, 1, None], "s": ["x", None, "z"]})
    path = write("parquet", tmp_path / "rows", table, group=1)
    for source in (table, path):
        with pytest.raises(DataError, match=r"Row 1: field 'a' has a null.*missing=") as caught:
            open_table(source).__getitems__([0, 1, 2])
        assert (caught.value.field, caught.value.index) == ("a", 1)
        filled = open_table(source, missing={"a": float("nan"), "b": -1})
        batches = list(DataLoader(filled, 1))
        assert {batch["a"].dtype for batch in batches} == {np.dtype(np.float32)}
        assert np.isnan(batches[1]["a"][0])
        assert batches[2]["b"].tolist() == [-1]
        assert [batch["s"][0] for batch in batches] == ["x", None, "z"]
        assert open_table(source, ["a"], missing={"a": 7}).column("a").tolist() == [1, 7, 3]
        assert open_table(source, ["a"], missing={"a": 7}).column("a").dtype == np.int64


def test_tables_of_many_chunks_are_read_where_they_are(tmp_path):
    path = write("file", tmp_path / "rows", pa.table(content(500)), group=3)
    before = pa.total_allocated_bytes()
    opened = open_table(path)
    assert len(opened._rows._chunks) == 167
    indices = order(0, 0, 500)[:40].tolist()
    batch = opened.__getitems__(indices)
    assert (batch["i"].tolist(), batch["text"].tolist()) == (
        indices,
        [f"row {i}é" for i in indices],
    )
    assert pa.total_allocated_bytes() - before < 10_000  # the file is mapped, not read
    assert batch["grid"][:, 0, 0].tolist() == indices


def test_batches_can_be_written_to_and_leave_the_table_as_it_was(opened):
    for indices in ([0, 1, 2], [5, 3]):
        for name in ("i", "x", "flag", "vector", "grid"):
            opened.__getitems__(indices)[name][:] = 0
            opened.rows(indices)[0]["vector"][:] = 0
    assert opened.__getitems__([1, 2])["i"].tolist() == [1, 2]


def test_no_rows_are_an_empty_batch(opened):
    assert opened.rows([]) == []
    assert {name: len(values) for name, values in opened.__getitems__([]).items()} == dict.fromkeys(
        opened.columns, 0
    )


def test_sliced_tables_keep_their_rows():
    table = pa.table({"v": [[i, i] for i in range(10)], "s": list("abcdefghij")}).slice(3, 4)
    batch = open_table(table).__getitems__([0, 3, 1])
    assert batch["v"].tolist() == [[3, 3], [6, 6], [4, 4]]
    assert batch["s"].tolist() == ["d", "g", "e"]


def test_other_datasets_take_tables_and_loaders_take_arrow_tables_as_they_are():
    table = pa.table({"x": [[1.0, 2], [3, 4], [5, 6]], "y": [0.0, 1, 2]})
    assert next(iter(DataLoader(table, 2)))["y"].tolist() == [0, 1]
    assert next(iter(DataLoader(Subset(table, [2, 0]), 2)))["y"].tolist() == [2, 0]
    pairs = MapBatches(table, lambda batch, rng: (batch["x"], batch["y"][:, None]))
    history = Trainer(nn.Linear(2, 1), optim.SGD(0.01), "mse").fit(pairs, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["z"]}, "no column 'z'. The table has: a, s"),
        ({"columns": "a"}, "columns='a'"),
        ({"columns": []}, "columns="),
        ({"columns": ["a", "a"]}, "twice"),
        ({"missing": {"s": 0}}, "missing has 's'"),
        ({"missing": {"a": "0"}}, "expected a number"),
        ({"missing": {"a": 2**70}}, "int64 cannot hold"),
        ({"num_kept": 0}, "num_kept"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        open_table(pa.table({"a": [1], "s": ["x"]}), **options)


@pytest.mark.parametrize("source", [3, None, [], [3], {"a": [1]}])
def test_what_is_no_table_is_refused(source):
    with pytest.raises(ConfigurationError, match="expected a path"):
        open_table(source)


def test_files_that_cannot_be_read_are_named(tmp_path):
    good = write("parquet", tmp_path / "good", pa.table({"a": [1]}))
    other = write("parquet", tmp_path / "other", pa.table({"a": ["x"]}))
    arrow = write("file", tmp_path / "arrow", pa.table({"a": [1]}))
    (tmp_path / "bad").write_bytes(b"PAR1 but nothing else")
    (tmp_path / "text").write_text("a,b\n1,2\n")
    (tmp_path / "empty").write_bytes(b"")
    for source, guilty in (
        (tmp_path / "none", "none"), (tmp_path / "bad", "bad"), (tmp_path / "text", "text"),
        (tmp_path / "empty", "empty"), ([good, other], "other"), ([good, arrow], "arrow"),
    ):  # fmt: skip
        with pytest.raises(DataError) as caught:
            open_table(source)
        assert caught.value.path == str(tmp_path / guilty)


def test_a_damaged_row_group_is_named(tmp_path):
    path = write("parquet", tmp_path / "rows", pa.table({"a": np.random.default_rng(0).random(99)}))
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises(DataError, match="row group 0 cannot be read") as caught:
        list(DataLoader(open_table(path), 5))
    assert caught.value.path == str(path)


def test_a_table_without_rows_is_refused_by_fit():
    trainer = Trainer(nn.Linear(2, 1), optim.SGD(0.01), "mse")
    with pytest.raises(DataError, match="empty"):
        trainer.fit(open_table(pa.table({"a": pa.array([], pa.int64())})), verbose=0)


@pytest.mark.parametrize("kind", ["parquet", "table"])
def test_a_target_makes_pairs_of_numbers(kind, tmp_path):
    table = pa.table(content())
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = table if kind == "table" else tmp_path / "a.parquet"
    rows = open_table(source, ["x", "flag"], target="i")
    x, y = next(iter(DataLoader(rows, batch_size=N)))
    expected = np.stack([np.array(table["x"]), np.array(table["flag"])], axis=1)
    np.testing.assert_array_equal(x, expected.astype(np.float32))
    assert (x.dtype, y.tolist()) == (np.float32, list(range(N)))
    one, target = pickle.loads(pickle.dumps(rows))[3]
    np.testing.assert_array_equal(one, expected[3])
    assert (target, rows.columns, len(rows)) == (3, ["x", "flag"], N)
    assert rows.group_sizes == ([5, 5, 5, 5, 3] if kind == "parquet" else [N])
    assert rows.column("i").tolist() == list(range(N))


def test_one_column_of_lists_is_x_as_it_is():
    rows = open_table(pa.table(content()), ["grid"], target="kind")
    x, y = next(iter(DataLoader(rows, batch_size=4)))
    assert (x.shape, x.dtype.kind, y) == ((4, 2, 2), "i", ["cat", "dog", "cat", "dog"])
    collated = next(iter(DataLoader(rows, batch_size=4, collate_fn=lambda pairs: pairs)))
    assert [target for _, target in collated] == y


def test_a_table_with_a_target_is_trained_on():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 2)).astype(np.float32)
    table = pa.table({"a": x[:, 0], "b": x[:, 1], "y": (x.sum(1) > 0).astype(np.int32)})
    losses = []
    for data in (open_table(table, target="y"), (x, np.array(table["y"]))):
        mx.random.seed(0)
        trainer = Trainer(nn.Linear(2, 2), optim.Adam(0.1), "cross_entropy", seed=0)
        losses.append(trainer.fit(data, epochs=3, verbose=0).history["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("columns", "target", "says"),
    [
        (None, "i", "found text: string"),
        (["x", "vector"], "i", "found vector: list"),
        (["i"], "i", "found none"),
        (None, "label", "There is no column 'label'|'label' is no column"),
        (["x"], "label", "no column 'label'"),
        (["x"], 3, "expected the name of a column"),
    ],
)
def test_a_target_that_cannot_work_is_refused(columns, target, says):
    with pytest.raises(ConfigurationError, match=says):
        open_table(pa.table(content()), columns, target=target)
