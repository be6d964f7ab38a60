from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch
from worker_datasets import StatefulStream

from mlx_fit.data import ConcatDataset, DataLoader, order
from mlx_fit.data.sources import as_source, split_rows
from mlx_fit.errors import ConfigurationError, DataError

X, Y = np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(10)


def source(data, *, batch_size=4, shuffle=False, seed=0, name="train"):
    return as_source(data, batch_size=batch_size, shuffle=shuffle, seed=seed, name=name)


class Rows:
    """A dataset in the manner of PyTorch; Hugging Face's also iterates over its rows."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": X[index], "y": int(Y[index])}

    def __iter__(self):
        return (self[index] for index in range(10))


class Batches:
    """An iterable that knows its length."""

    def __init__(self, batches):
        self.list = batches

    def __iter__(self):
        return iter(self.list)

    def __len__(self):
        return len(self.list)


@pytest.mark.parametrize("wrap", [np.array, mx.array, torch.tensor])
def test_a_tuple_is_x_y_weights_of_rows(wrap):
    data = (wrap(X), wrap(Y), wrap(Y / 10))
    train = source(data)
    batches = list(train.batches(0))
    assert (train.num_batches, train.num_rows, train.one_shot) == (3, 10, False)
    assert [len(y) for _, y, _ in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate([x for x, _, _ in batches]), X)
    assert batches[0][2].dtype == np.float32


@pytest.mark.parametrize("data", [X, mx.array(X), (X,), {"x": X, "m": X}, torch.tensor(X)])
def test_an_array_or_a_dict_of_arrays_alone_is_x(data):
    batch = next(source(data).batches(0))
    x = batch["x"] if isinstance(data, dict) else batch
    assert np.array_equal(x, X[:4])


def test_x_and_y_may_be_trees_and_y_a_list_of_numbers():
    x, y = next(source(({"a": X, "b": [X, Y]}, Y.tolist())).batches(0))
    assert np.array_equal(x["b"][1], Y[:4])
    assert y.tolist() == [0, 1, 2, 3]


def test_arrays_are_shuffled_by_seed_and_epoch():
    train = source((X, Y), shuffle=True, seed=3)
    for epoch in (2, 0, 2):
        batches = list(train.batches(epoch))
        assert np.concatenate([y for _, y in batches]).tolist() == order(3, epoch, 10).tolist()
        assert all(np.array_equal(x, X[y]) for x, y in batches)


def test_a_list_is_a_list_of_batches_and_keeps_its_order():
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    train = source(batches, shuffle=True)
    assert train.num_batches == 2
    for epoch in range(2):
        assert all(given is kept for given, kept in zip(train.batches(epoch), batches, strict=True))


@pytest.mark.parametrize(
    "data", [Rows(), ConcatDataset([Rows()]), torch.utils.data.Subset(Rows(), range(10))]
)
def test_a_dataset_is_batched_by_rows(data):
    train = source(data, shuffle=True, seed=1)
    assert (train.num_batches, train.num_rows) == (3, 10)
    batch = next(train.batches(5))
    assert batch["y"].tolist() == order(1, 5, 10)[:4].tolist()
    assert np.array_equal(batch["x"], X[batch["y"]])


@pytest.mark.parametrize("data", [
    torch.utils.data.DataLoader(torch.tensor(Y), batch_size=5),
    DataLoader(Y, batch_size=5),
    Batches([Y[:5], Y[5:]]),
])  # fmt: skip
def test_an_iterable_gives_batches_again_for_each_pass(data):
    train = source(data)
    assert (train.num_batches, train.one_shot) == (2, False)
    for epoch in range(2):
        assert [batch.tolist() for batch in train.batches(epoch)] == [
            [0, 1, 2, 3, 4],
            [5, 6, 7, 8, 9],
        ]


def test_our_loader_counts_its_own_epochs():
    loader, same = (DataLoader(Y, 5, shuffle=True, seed=2) for _ in range(2))
    train = source(loader)
    for _ in range(3):
        assert [b.tolist() for b in train.batches(0)] == [b.tolist() for b in same]


def test_a_loader_without_length_has_an_unknown_number_of_batches():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(10))

    for loader in (torch.utils.data.DataLoader(Stream()), DataLoader(Stream(), batch_size=5)):
        train = source(loader)
        assert train.num_batches is None
        assert len(list(train.batches(0))) == len(list(train.batches(1))) > 0


def test_an_iterator_is_one_shot():
    train = source(iter([1, 2, 3]))
    assert (train.one_shot, train.num_batches) == (True, None)
    assert [next(train.batches(0)), *train.batches(1)] == [1, 2, 3]


@pytest.mark.parametrize("make", [lambda: [X], lambda: iter([X]), lambda: (x for x in [X])])
def test_a_function_is_called_for_each_pass(make):
    train = source(make)
    assert not train.one_shot
    for epoch in range(2):
        assert [batch is X for batch in train.batches(epoch)] == [True]


@pytest.mark.parametrize("result", [None, 3, (X, Y), {"x": X}])
def test_a_function_that_returns_no_batches_is_refused(result):
    with pytest.raises(DataError, match=f"train: the function returned a {type(result).__name__}"):
        source(lambda: result).batches(0)


@pytest.mark.parametrize(
    "data", [[], np.zeros((0, 3)), (X[:0], Y[:0]), {}, Batches([]), DataLoader([]), ()]
)
def test_empty_data_is_refused_by_name(data):
    with pytest.raises(DataError, match="test set"):
        source(data, name="test set")


@pytest.mark.parametrize("data", [None, 3, "train.csv", np.float32(1), object(), Rows])
def test_what_is_no_data_is_refused_with_what_is_accepted(data):
    with pytest.raises(DataError, match=r"val is .*Accepted are: .*list of batches"):
        source(data, name="val")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:9]), "val: x has 10 rows, but y has 9"),
        ((Rows(), Y), "val: x is a Rows"),
        ((X, Y, Y, Y), "val is a tuple of 4"),
    ],
)
def test_tuples_that_do_not_fit_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        source(data, name="val")


def test_a_named_tuple_of_arrays_is_a_batch_of_its_class():
    class Tokens(NamedTuple):
        tokens: object
        mask: object

    batch = next(source(Tokens(X, Y)).batches(0))
    assert isinstance(batch, Tokens)
    assert batch.mask.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("n", "fraction", "num_train"),
    [(10, 0.3, 7), (10, 0.25, 7), (3, 0.1, 2), (10, 0.9, 1), (10, 0.1 + 0.2, 7), (100, 0.29, 71),
     (3, 1 / 3, 2), (1000, 0.007, 993)],
)  # fmt: skip
def test_the_last_rows_are_split_off(n, fraction, num_train):
    x, w = np.arange(2 * n).reshape(n, 2), np.arange(n)
    train, val = split_rows((x, {"y": w}, w), fraction)
    assert [len(train), len(val)] == [num_train, n - num_train]
    x_val, y_val, w_val = val.__getitems__(range(len(val)))
    assert np.array_equal(x_val, x[num_train:])
    assert np.array_equal(y_val["y"], w_val)
    assert w_val.tolist() == list(range(num_train, n))


def test_a_dataset_is_split_by_rows():
    train, val = split_rows(Rows(), 0.25)
    assert [row["y"] for row in (train[0], train[6], val[0], val[2])] == [0, 6, 7, 9]
    assert next(source(val).batches(0))["y"].tolist() == [7, 8, 9]


@pytest.mark.parametrize("data", [[(X, Y)], iter([X]), DataLoader(X), lambda: [X], Batches([X])])
def test_batches_are_not_split(data):
    with pytest.raises(DataError, match="validation_split takes rows"):
        split_rows(data, 0.2)


@pytest.mark.parametrize("fraction", [0.0, 1, -0.1, 1.5, "0.2"])
def test_a_split_is_a_fraction(fraction):
    with pytest.raises(ConfigurationError, match="validation_split="):
        split_rows(X, fraction)


def test_a_split_leaves_rows_on_both_sides():
    with pytest.raises(DataError, match="of 1 rows leaves 0 for training"):
        split_rows(X[:1], 0.5)


def test_a_keras_dataset_gives_batches():
    class PyDataset:
        __module__ = "keras.src.trainers"

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return np.full((4, 3), index), np.zeros(4)

    source = as_source(PyDataset(), batch_size=2, shuffle=True, seed=0)
    PyDataset.__module__ = "keras.src.trainers"
    assert [x[0, 0] for x, _ in source.batches(0)] == [0, 1]


def test_parts_that_are_none_at_the_end_are_left_out():
    x = np.ones((4, 2))
    [batch] = as_source((x, x, None), batch_size=4, shuffle=False, seed=0).batches(0)
    assert len(batch) == 2


def test_a_batch_of_a_stateful_stream_that_was_not_taken_is_read_again():
    data = source(DataLoader(StatefulStream(12), 4))
    batches = data.batches(0)
    next(batches)
    position = data.position(1, untaken=next(batches))
    resumed = source(DataLoader(StatefulStream(12), 4))
    resumed.restore(position, 1)
    with pytest.warns(UserWarning, match="first 4 rows"):
        assert next(resumed.batches(0)).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ((np.array([[1, 2], [3, 4]], dtype=object), np.zeros(2)), "x"),
        ((np.zeros((2, 2)), np.array([None, 1], dtype=object)), "y"),
        ({"a": np.zeros(2), "b": np.array([[1], [2, 3]], dtype=object)}, "b"),
        (np.zeros(0, dtype=object), "x"),
    ],
)
def test_arrays_of_objects_are_refused_by_name(data, field):
    with pytest.raises(DataError, match=rf"train: {field} is an array of Python objects") as found:
        source(data)
    assert found.value.field == field
