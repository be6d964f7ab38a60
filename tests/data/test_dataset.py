import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_fit.data import ArrayDataset, ConcatDataset, DataLoader, Map, Subset, random_split
from mlx_fit.errors import ConfigurationError, DataError


class Squares:
    """Rows by index only."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return index * index


def test_a_batch_has_the_structure_of_the_arrays():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    dataset = ArrayDataset(({"a": x, "b": (x, y)}, [y, x]))
    (inputs, targets), rows = dataset.__getitems__([4, 1]), [4, 1]
    assert np.array_equal(inputs["a"], x[rows])
    assert np.array_equal(inputs["b"][1], y[rows])
    assert isinstance(targets, list)
    assert np.array_equal(targets[1], x[rows])
    assert np.array_equal(dataset[3][0]["b"][0], x[3])


@pytest.mark.parametrize("wrap", [mx.array, torch.tensor, list, np.array])
def test_anything_array_like_is_a_column(wrap):
    dataset = ArrayDataset((wrap([5, 6, 7]), np.zeros((3, 2))))
    labels, _ = dataset.__getitems__([2, 0])
    assert isinstance(labels, np.ndarray)
    assert labels.tolist() == [7, 5]


def test_a_bfloat16_array_is_widened():
    batch = ArrayDataset(mx.array([1.5, 2.5], dtype=mx.bfloat16)).__getitems__([1])
    assert batch.dtype == np.float32
    assert batch.tolist() == [2.5]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float64", "float32"), ("float16", "float16"), ("int64", "int64"), ("bool", "bool"),
     ("uint8", "uint8"), (">f4", "float32"), (">i4", "int32")],
)  # fmt: skip
def test_float64_becomes_float32_and_the_rest_stays(dtype, expected):
    dataset = ArrayDataset(np.ones((3, 2), dtype=dtype))
    for batch in (dataset.__getitems__([0, 1]), dataset.__getitems__(range(2)), dataset[0]):
        assert batch.dtype == np.dtype(expected)
        assert batch.dtype.isnative
        assert batch.all()


def test_a_column_of_strings_gives_a_list():
    assert ArrayDataset({"text": ["a", "b", "c"]}).__getitems__([2, 0]) == {"text": ["c", "a"]}


def test_batches_do_not_alias_the_data():
    x = np.zeros((4, 2), dtype=np.float32)
    dataset = ArrayDataset(x)
    for batch in (dataset.__getitems__(range(2)), dataset.__getitems__([0, 1]), dataset[0]):
        batch += 1
    assert not x.any()


def test_a_memory_map_is_not_read_whole(tmp_path):
    x = np.memmap(tmp_path / "x.bin", dtype=np.float64, mode="w+", shape=(50, 3))
    x[:] = np.arange(150).reshape(50, 3)
    dataset = ArrayDataset((x, np.arange(50)))
    x[7] = -1  # seen through the dataset, so it holds the file and no copy
    assert dataset.__getitems__([7, 8])[0].tolist() == [[-1, -1, -1], [24, 25, 26]]


def test_a_clash_of_lengths_names_both_arrays():
    with pytest.raises(DataError, match=r"x\.a has 10 rows, but y has 9"):
        ArrayDataset(({"a": np.zeros(10)}, np.zeros(9)))


@pytest.mark.parametrize("leaf", [None, 3.0, np.float32(1), Squares(3), mx.array(1.0)])
def test_a_part_without_rows_is_refused_by_name(leaf):
    with pytest.raises(DataError, match=r"^y is") as caught:
        ArrayDataset((np.zeros(3), leaf))
    assert caught.value.field == "y"


def test_a_ragged_list_is_refused_by_name():
    with pytest.raises(DataError, match="y cannot be made an array"):
        ArrayDataset((np.zeros(2), [[1], [2, 3]]))


def test_a_subset_reads_whole_batches_of_arrays():
    x = np.arange(20.0).reshape(10, 2)
    subset = Subset(Subset(x, [9, 8, 7, 6]), [3, 1])
    assert len(subset) == 2
    assert subset.__getitems__(range(2)).tolist() == x[[6, 8]].tolist()
    assert subset[1].tolist() == x[8].tolist()
    assert Subset(Squares(9), [8, 3]).__getitems__([1, 0]) == [9, 64]


@pytest.mark.parametrize("indices", [np.arange(10) < 3, [True, False], [1.5], 3, [[0, 1]], ["a"]])
def test_indices_of_a_subset_that_are_no_integers_are_refused(indices):
    with pytest.raises(ConfigurationError, match=r"expected integers of shape \(rows,\)"):
        Subset(np.arange(10), indices)


def test_a_subset_may_be_empty():
    assert len(Subset(np.arange(10), [])) == 0


def test_datasets_are_concatenated_in_order():
    joined = ConcatDataset([Squares(3), Squares(0), Subset(Squares(9), [5])])
    assert [joined[i] for i in range(len(joined))] == [0, 1, 4, 25]
    assert joined[-1] == 25
    with pytest.raises(IndexError):
        joined[4]


def pair(start, stop, dtype=np.float32):
    x = np.arange(start, stop, dtype=dtype)
    return ArrayDataset((np.stack([x, -x], axis=1), x.astype(np.int64)))


class Counted(ArrayDataset):
    """Counts the rows that are asked for one by one."""

    num_single = 0

    def __getitem__(self, index):
        self.num_single += 1
        return super().__getitem__(index)


def test_concatenated_arrays_are_read_as_whole_batches():
    parts = [Counted(np.arange(start, start + 4)) for start in (0, 4, 8)]
    joined = ConcatDataset([parts[0], Subset(parts[1], [3, 2, 1, 0]), parts[2]])
    batch = joined.__getitems__(np.array([11, 0, 4, 8, 3, 4]))
    np.testing.assert_array_equal(batch, [11, 0, 7, 8, 3, 7])
    assert [part.num_single for part in parts] == [0, 0, 0]
    assert len(list(DataLoader(joined, batch_size=5, shuffle=True))) == 3
    assert [part.num_single for part in parts] == [0, 0, 0]


@pytest.mark.parametrize(
    "parts",
    [
        [pair(0, 5), pair(5, 9)],
        [pair(0, 5), pair(5, 9, np.float16)],
        [pair(0, 5), [(np.array([5.0, -5.0], np.float32), 5)], pair(6, 9)],
        [[(np.array([i, -i], np.float32), i) for i in range(4)], pair(4, 9)],
        [pair(0, 9), pair(9, 9)],
    ],
    ids=["alike", "of two precisions", "a list between", "a list first", "an empty one"],
)
def test_a_batch_over_several_datasets_has_the_rows_in_the_order_asked_for(parts):
    order = [8, 0, 5, 3, 3]
    loader = DataLoader(ConcatDataset(parts), batch_sampler=[order])
    ((x, y),) = loader
    np.testing.assert_array_equal(x, [[i, -i] for i in order])
    np.testing.assert_array_equal(y, order)


def test_a_collate_fn_gets_the_rows_of_concatenated_arrays():
    loader = DataLoader(ConcatDataset([pair(0, 2), pair(2, 4)]), batch_size=4, collate_fn=len)
    assert list(loader) == [4]


@pytest.mark.parametrize("given", [3, None, "ab", np.arange(3), [3]])
def test_what_holds_no_datasets_cannot_be_concatenated(given):
    with pytest.raises(ConfigurationError, match="dataset"):
        ConcatDataset(given)


def test_a_split_needs_a_list():
    with pytest.raises(ConfigurationError, match=r"random_split got 0.5.*\[0.9, 0.1\]"):
        random_split(np.arange(10), 0.5)


@pytest.mark.parametrize("text", ["data/train.csv", b"train"])
def test_text_is_no_dataset_of_its_characters(text):
    for read in (DataLoader, lambda data: Subset(data, [0]), lambda data: ConcatDataset([data])):
        with pytest.raises(ConfigurationError, match=r"train.*open_table"):
            read(text)


def test_map_draws_from_seed_epoch_and_index():
    noisy = Map(Squares(5), lambda row, rng: row + rng.random())
    batches = list(DataLoader(noisy.seeded(7, 2), batch_size=5, seed=7))
    loader = DataLoader(Subset(ConcatDataset([noisy]), [4, 1]), batch_size=2, seed=7)
    loader.set_epoch(2)
    expected = [i * i + np.random.default_rng([7, 2, i]).random() for i in (4, 1)]
    np.testing.assert_allclose(next(iter(loader)), expected, rtol=1e-6)
    loader.set_epoch(3)
    assert abs(next(iter(loader)) - expected).min() > 1e-3
    assert batches[0].shape == (5,)


def test_a_map_of_a_map_goes_on_with_the_generator():
    twice = Map(
        Map(Squares(3), lambda row, rng: (row, rng.random())), lambda r, rng: (*r, rng.random())
    )
    rng = np.random.default_rng([0, 0, 2])
    assert twice[2] == (4, rng.random(), rng.random())


def test_map_refuses_an_iterable():
    with pytest.raises(ConfigurationError, match="generator"):
        Map((i for i in range(3)), lambda row, rng: row)


def test_a_random_split_covers_the_rows_once():
    parts = random_split(Squares(10), [0.7, 0.2, 0.1], seed=1)
    assert [len(part) for part in parts] == [7, 2, 1]
    assert sorted(row for part in parts for row in part.__getitems__(range(len(part)))) == [
        i * i for i in range(10)
    ]
    assert [p.indices.tolist() for p in parts] != [
        p.indices.tolist() for p in random_split(Squares(10), [7, 2, 1], seed=2)
    ]


@pytest.mark.parametrize("fractions", [[0.5, 0.5], [0.1] * 10, [1 / 3, 2 / 3], [0.31, 0.29, 0.4]])
@pytest.mark.parametrize("n", [11, 97])
def test_fractions_give_the_lengths_of_torch(n, fractions):
    expected = torch.utils.data.random_split(range(n), fractions)
    assert [len(p) for p in random_split(Squares(n), fractions)] == [len(p) for p in expected]


def test_fractions_are_taken_as_written():
    # In floats 0.29 * 100 is below 29.
    assert [len(part) for part in random_split(Squares(100), [0.71, 0.29])] == [71, 29]


@pytest.mark.parametrize(
    "parts", [[3, 3], [0.5, 0.4], [4, 0.6], [10, 0], [1.5, -0.5], [0.99, 0.01]]
)
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ConfigurationError, match="10 rows"):
        random_split(Squares(10), parts)
