import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import mlx_fit.data
from mlx_fit.data import DataLoader, Map, order
from mlx_fit.errors import ConfigurationError, DataError, ResumeError


class Stream:
    """Rows that can only be iterated over."""

    def __init__(self, n):
        self.n = n
        self.num_read = 0

    def __iter__(self):
        for row in range(self.n):
            self.num_read += 1
            yield row


def rows(loader):
    return [batch.tolist() for batch in loader]


def shuffled(n=40, batch_size=4, **options):
    return DataLoader(range(n), batch_size, shuffle=True, **{"seed": 0, **options})


def after(num_batches, loader):
    """The state of a loader after some batches of its next epoch."""
    iterator = iter(loader)
    for _ in range(num_batches):
        next(iterator)
    return json.loads(json.dumps(loader.state_dict()))


# --- order ---------------------------------------------------------------------------------------


def test_an_epoch_follows_the_order_of_its_seed_and_number():
    loader = shuffled(n=10)
    for epoch in range(3):
        expected = order(0, epoch, 10).tolist()
        assert rows(loader) == [expected[:4], expected[4:8], expected[8:]]


def test_seed_0_is_a_seed():
    assert rows(shuffled(seed=0)) == rows(shuffled(seed=0)) != rows(shuffled(seed=1))


def test_without_a_seed_each_loader_draws_one():
    assert rows(shuffled(seed=None)) != rows(shuffled(seed=None))


def test_an_iterator_left_early_does_not_count():
    loader, whole = shuffled(), rows(shuffled())
    for num_batches in (1, 10):  # the iterator has given all ten, but has not ended
        after(num_batches, loader)
    assert rows(loader) == whole
    assert rows(loader) != whole


def test_interleaved_iterators_read_the_same_epoch():
    loader = shuffled()
    assert all((a == b).all() for a, b in zip(loader, loader, strict=False))
    assert loader.state_dict()["epoch"] == 1


def test_set_epoch_chooses_the_next_epoch():
    loader, other = shuffled(), shuffled()
    rows(loader)
    second = rows(loader)
    other.set_epoch(1)
    assert rows(other) == second
    other.set_epoch(1)
    assert rows(other) == second


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (8, 8), (1, 1), (3995, 8)])
def test_sizes_are_those_of_torch(n, batch_size, drop_last):
    ours = DataLoader(range(n), batch_size, drop_last=drop_last)
    theirs = torch.utils.data.DataLoader(range(n), batch_size, drop_last=drop_last)
    assert len(ours) == len(theirs)
    assert rows(ours) == rows(theirs)


def test_a_batch_larger_than_the_data_is_short():
    assert rows(DataLoader(range(3), batch_size=8)) == [[0, 1, 2]]


def test_drop_last_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="3 samples, batch_size 8, drop_last: 0 batches"):
        DataLoader(range(3), batch_size=8, drop_last=True)


def test_no_rows_give_no_batches():
    assert rows(DataLoader([], batch_size=4, shuffle=True)) == []


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": [1], "shuffle": True}, "sampler"),
        ({"batch_sampler": [[1]], "batch_size": 2}, "batch_size"),
        ({"batch_sampler": [[1]], "shuffle": True}, "shuffle"),
        ({"batch_sampler": [[1]], "sampler": [1]}, "sampler"),
        ({"batch_sampler": [[1]], "drop_last": True}, "drop_last"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": None}, "batch_size=None"),
        ({"shuffle": "batch"}, "shuffle='batch'"),
        ({"drop_last": 1}, "drop_last=1"),
        ({"sampler": 3}, "sampler is a int"),
        ({"batch_sampler": 3}, "batch_sampler is a int"),
        ({"collate_fn": 3}, "collate_fn is a int"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(options, named):
    with pytest.raises(ConfigurationError, match=named):
        DataLoader(range(4), **options)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": [0]}, {"batch_sampler": [[0]]}])
def test_an_iterable_keeps_its_own_order(options):
    with pytest.raises(ConfigurationError, match="Stream"):
        DataLoader(Stream(4), **options)


def test_what_is_no_dataset_is_refused():
    with pytest.raises(ConfigurationError, match="int"):
        DataLoader(5)


def test_a_collate_fn_gets_the_rows():
    def widths(samples):
        return [len(sample) for sample in samples]

    ragged = [[0] * n for n in (3, 1, 2)]
    assert list(DataLoader(ragged, batch_size=2, collate_fn=widths)) == [[3, 1], [2]]
    arrays = DataLoader((np.zeros((3, 5)), np.arange(3)), batch_size=2, collate_fn=list)
    assert [int(y) for _, y in next(iter(arrays))] == [0, 1]


# --- state ---------------------------------------------------------------------------------------


def test_a_state_in_epoch_two_leaves_the_rest_and_the_next_epoch_unchanged():
    uninterrupted, stopped, resumed = shuffled(), shuffled(), shuffled()
    epochs = [rows(uninterrupted) for _ in range(3)]
    rows(stopped)
    resumed.load_state_dict(after(3, stopped))
    assert rows(resumed) == epochs[1][3:]
    assert rows(resumed) == epochs[2]


def test_two_resumes_in_one_epoch_count_from_its_start():
    whole = rows(shuffled(n=400))
    first, second = shuffled(n=400), shuffled(n=400)
    second.load_state_dict(after(30, first))
    state = after(10, second)
    assert state["samples_consumed"] == 160
    third = shuffled(n=400)
    third.load_state_dict(state)
    assert rows(third) == whole[40:]


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next():
    loader, resumed = shuffled(n=12), shuffled(n=12)
    rows(loader)
    resumed.load_state_dict(loader.state_dict())
    assert rows(resumed) == rows(loader)
    assert len(rows(resumed)) == 3


def test_a_state_after_the_last_batch_has_an_empty_remainder():
    loader, resumed = shuffled(n=12), shuffled(n=12)
    resumed.load_state_dict(after(3, loader))
    assert rows(resumed) == []
    rows(loader)
    assert rows(resumed) == rows(loader)


def test_a_state_before_the_first_batch_is_the_whole_epoch():
    resumed = shuffled()
    resumed.load_state_dict(shuffled().state_dict())
    assert rows(resumed) == rows(shuffled())


def test_the_remainder_of_a_loaded_state_is_given_once():
    whole, resumed = rows(shuffled()), shuffled()
    resumed.load_state_dict(after(3, shuffled()))
    resumed.set_epoch(0)  # where it is anyway
    assert next(iter(resumed)).tolist() == whole[3]
    assert rows(resumed) == whole


def test_an_old_iterator_does_not_move_a_loader_that_was_sent_elsewhere():
    loader = shuffled()
    old = iter(loader)
    loader.load_state_dict(after(3, shuffled()))
    list(old)
    assert loader.state_dict()["samples_consumed"] == 12
    assert len(rows(loader)) == 7


def test_an_old_iterator_does_not_move_a_loader_that_went_on():
    loader = shuffled()
    old = iter(loader)
    for _ in range(3):
        rows(loader)
    list(old)
    assert loader.state_dict()["epoch"] == 3


def test_another_epoch_after_a_loaded_state_is_whole():
    loader = shuffled()
    loader.load_state_dict(after(3, shuffled()))
    loader.set_epoch(5)
    assert len(rows(loader)) == 10


def test_the_state_is_small_json():
    text = json.dumps(after(2, DataLoader(range(10_000_000), 64, seed=3)))
    assert len(text) < 1000
    assert json.loads(text) == {
        "version": 1, "seed": 3, "epoch": 0, "samples_consumed": 128, "n": 10_000_000,
        "batch_size": 64, "shuffle": False, "drop_last": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 41}, "n=40, .* n=41"),
        ({"batch_size": 5}, "batch_size=4, .* batch_size=5"),
        ({"drop_last": True}, "drop_last=False, .* drop_last=True"),
        ({"seed": 1}, "seed=0, .* seed=1"),
    ],
)
def test_a_state_of_another_set_up_is_refused_by_field(options, message):
    with pytest.raises(ResumeError, match=message):
        shuffled(**options).load_state_dict(shuffled().state_dict())


@pytest.mark.parametrize("change", [{"version": 0}, {"shuffle": False}, {"extra": 1}])
def test_a_foreign_state_is_refused(change):
    with pytest.raises(ResumeError, match=next(iter(change))):
        shuffled().load_state_dict({**shuffled().state_dict(), **change})


def test_a_loader_without_a_seed_takes_the_saved_one():
    loader, resumed = shuffled(seed=None), shuffled(seed=None)
    resumed.load_state_dict(after(3, loader))
    assert rows(resumed) == rows(loader)[3:]


# --- reading -------------------------------------------------------------------------------------


class Whole:
    """Rows by list of indices, as arrays or as a list; counts its calls."""

    def __init__(self, give):
        self.give = give
        self.asked = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise AssertionError("rows should be read by whole batches")

    def __getitems__(self, indices):
        self.asked.append(indices)
        return self.give(indices)


@pytest.mark.parametrize(
    "give", [np.array, lambda rows: [int(i) for i in rows], lambda rows: torch.tensor(rows)]
)
def test_whole_batches_are_read_by_one_call(give):
    dataset = Whole(give)
    assert rows(DataLoader(dataset, batch_size=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert dataset.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert type(dataset.asked[0]) is list


def test_whole_batches_may_be_trees():
    dataset = Whole(lambda rows: ({"x": np.array(rows, dtype=np.float64)}, np.array(rows)))
    x, y = next(iter(DataLoader(dataset, batch_size=4)))
    assert (x["x"].dtype, y.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    "give", [lambda rows: rows[1:], lambda rows: np.array(rows[1:]), lambda rows: {"x": np.ones(3)}]
)
def test_a_whole_batch_of_another_length_is_an_error(give):
    with pytest.raises(DataError, match=r"returned 3 rows.* for 4 indices"):
        next(iter(DataLoader(Whole(give), batch_size=4)))


class Failing:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 37:
            raise KeyError("from")
        return index


def test_a_failing_sample_is_named_after_the_batches_before_it():
    loader, seen = DataLoader(Failing(), batch_size=4), []
    with pytest.raises(KeyError, match="from") as caught:
        seen.extend(batch.tolist() for batch in loader)
    assert seen == rows(DataLoader(range(36), batch_size=4))
    assert caught.value.__notes__ == ["While reading sample 37 (epoch 0, batch 9, counted from 0)."]
    assert loader.state_dict()["samples_consumed"] == 36


def test_rows_that_cannot_be_stacked_are_named_by_their_index():
    data = [np.zeros(2)] * 5 + [np.zeros(3)] * 3
    with pytest.raises(DataError, match="Row 5") as caught:
        list(DataLoader(data, batch_size=4))
    assert "[4, 5, 6, 7] (epoch 0, batch 1" in caught.value.__notes__[0]


def test_map_knows_the_epoch_and_repeats_it():
    def noise(row, rng):
        return rng.random()

    loader, resumed = (DataLoader(Map(range(6), noise), 2, seed=5) for _ in range(2))
    expected = [[np.random.default_rng([5, e, i]).random() for i in range(6)] for e in range(2)]
    for epoch in range(2):
        np.testing.assert_allclose(np.concatenate(list(loader)), expected[epoch], rtol=1e-6)
    resumed.load_state_dict({**resumed.state_dict(), "epoch": 1, "samples_consumed": 4})
    np.testing.assert_allclose(next(iter(resumed)), expected[1][4:], rtol=1e-6)


@pytest.mark.parametrize(
    "structure", [lambda x, y: x, lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_of_arrays_costs_at_most_three_calls(structure, shuffle):
    folder = str(Path(mlx_fit.data.__file__).parent)
    data = structure(np.zeros((1000, 3)), np.arange(1000))
    # No thread: on a busy machine a batch may take so long that one is tried.
    loader = DataLoader(data, batch_size=4, shuffle=shuffle, prefetch_factor=0)
    iterator, calls = iter(loader), []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls.append(frame.f_code.co_name)

    next(iterator)
    sys.setprofile(count)
    for _ in range(100):
        next(iterator)
    sys.setprofile(None)
    assert len(calls) <= 300, Counter(calls)


def test_going_far_ahead_reads_no_row_before():
    class Log:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 10**8

        def __getitem__(self, index):
            self.read.append(index)
            return index

    loader = DataLoader(log := Log(), batch_size=8, shuffle=True, seed=1)
    loader.load_state_dict({**loader.state_dict(), "samples_consumed": 8_000_000})
    assert (
        next(iter(loader)).tolist() == log.read == order(1, 0, 10**8)[8_000_000:8_000_008].tolist()
    )


# --- iterables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_iterable_is_batched_in_its_order_each_epoch(drop_last):
    loader = DataLoader(Stream(10), batch_size=4, drop_last=drop_last)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7]] + ([] if drop_last else [[8, 9]])
    assert rows(loader) == rows(loader) == expected


def test_a_torch_iterable_dataset_with_a_length_is_iterated_over():
    class Numbers(torch.utils.data.IterableDataset):
        def __len__(self):
            return 5

        def __iter__(self):
            return iter(range(5))

    loader = DataLoader(Numbers(), batch_size=2)
    assert (len(loader), rows(loader)) == (3, [[0, 1], [2, 3], [4]])


def test_an_iterable_has_no_length():
    with pytest.raises(TypeError, match="Stream"):
        len(DataLoader(Stream(10)))


def test_nothing_is_read_ahead_from_an_iterable():
    after(2, DataLoader(stream := Stream(100), batch_size=4))
    assert stream.num_read == 8


def test_an_iterable_resumes_by_reading_up_to_the_position():
    resumed = DataLoader(Stream(10), batch_size=4)
    resumed.load_state_dict({**resumed.state_dict(), "samples_consumed": 4})
    with pytest.warns(UserWarning, match="first 4 rows are read and discarded") as warned:
        assert rows(resumed) == [[4, 5, 6, 7], [8, 9]]
    assert len(warned) == 1
    assert rows(resumed)[0] == [0, 1, 2, 3]


def test_an_iterable_that_became_too_short_is_an_error():
    resumed = DataLoader(Stream(3), batch_size=4)
    resumed.load_state_dict({**resumed.state_dict(), "samples_consumed": 8})
    with (
        pytest.warns(UserWarning, match="discarded"),
        pytest.raises(ResumeError, match="8 samples"),
    ):
        next(iter(resumed))


def test_an_iterator_can_be_read_once():
    loader = DataLoader((i for i in range(3)), batch_size=2)
    assert rows(loader) == [[0, 1], [2]]
    with pytest.raises(DataError, match="read once"):
        iter(loader)


def test_rows_of_an_iterable_that_cannot_be_stacked_are_named():
    with pytest.raises(DataError, match="Row 3") as caught:
        list(DataLoader(iter([1, 2, 3, None]), batch_size=2))
    assert "[2, 3] (epoch 0, batch 1" in caught.value.__notes__[0]


def test_a_failing_iterable_names_the_row():
    def broken():
        yield from range(6)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone") as caught:
        list(DataLoader(broken(), batch_size=4))
    assert "sample 6 (epoch 0, batch 1" in caught.value.__notes__[0]


@pytest.mark.parametrize("timeout", [0, 60])
def test_a_sample_that_raises_stop_iteration_is_named(timeout):
    class Ends:
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return index if index != 37 else next(iter(()))

    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        list(DataLoader(Ends(), 4, timeout=timeout))
    assert "sample 37 (epoch 0, batch 9" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "loader",
    [
        lambda n: DataLoader(Stream(n), 4, drop_last=True),
        lambda n: DataLoader(range(9), 4, sampler=(i for i in range(n)), drop_last=True),
    ],
)
def test_drop_last_that_leaves_nothing_of_unknown_length_raises(loader):
    with pytest.raises(DataError, match="3 samples, batch_size 4, drop_last: 0 batches"):
        list(loader(3))
    assert len(list(loader(6))) == 1
