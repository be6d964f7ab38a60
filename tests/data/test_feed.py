import itertools
import threading

import numpy as np
import pytest

from mlx_fit.data import DataLoader, order
from mlx_fit.data.feed import Feed, Replay
from mlx_fit.data.sources import as_source
from mlx_fit.errors import DataError


def source(data, *, shuffle=False, name="train"):
    return as_source(data, batch_size=2, shuffle=shuffle, seed=0, name=name)


def epochs(feed, count):
    return [list(feed.epoch()) for _ in range(count)]


class Counted:
    """An endless iterator that says how far it was read."""

    def __init__(self, end=None):
        self.end = end
        self.drawn = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self.end:
            raise StopIteration
        self.drawn += 1
        return self.drawn - 1


def test_without_steps_an_epoch_is_a_pass():
    feed = Feed(source([10, 11, 12]))
    assert epochs(feed, 2) == [[10, 11, 12]] * 2
    assert (feed.passes_started, feed.passes_finished) == (2, 2)


def test_with_steps_passes_are_joined():
    feed = Feed(source(list(range(10))), steps_per_epoch=4)
    assert epochs(feed, 5) == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]
    ]  # fmt: skip
    assert (feed.passes_started, feed.passes_finished) == (2, 2)


def test_an_epoch_may_join_several_passes():
    assert epochs(Feed(source([0, 1]), steps_per_epoch=5), 2) == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


def test_an_endless_iterator_is_drawn_exactly_as_often_as_asked():
    feed = Feed(source(data := Counted()), steps_per_epoch=5)
    assert epochs(feed, 2) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert data.drawn == 10


def test_an_epoch_left_early_goes_on_in_the_next():
    feed = Feed(source(Counted()), steps_per_epoch=5)
    assert list(itertools.islice(feed.epoch(), 2)) == [0, 1]
    assert list(feed.epoch()) == [2, 3, 4, 5, 6]


def test_arrays_are_shuffled_anew_in_each_pass_from_the_start_epoch():
    feed = Feed(source(np.arange(6), shuffle=True), start_epoch=3)
    for epoch in (3, 4):
        assert np.concatenate(list(feed.epoch())).tolist() == order(0, epoch, 6).tolist()
    joined = Feed(source(np.arange(6), shuffle=True), steps_per_epoch=2)
    seen = np.concatenate([*itertools.chain(*epochs(joined, 3))])
    assert seen.tolist() == [*order(0, 0, 6), *order(0, 1, 6)]


@pytest.mark.parametrize(
    ("steps", "text"), [(10, "after 7 of 10 steps"), (4, "after 3 of 4 steps")]
)
def test_an_iterator_that_ends_within_an_epoch_is_an_error(steps, text):
    feed = Feed(source(Counted(7)), steps_per_epoch=steps)
    with pytest.raises(DataError, match=rf"train .* given 7 batches .*{text}.*function .*list"):
        epochs(feed, 2)


@pytest.mark.parametrize("steps", [None, 5])
def test_an_iterator_does_not_train_a_second_epoch_on_nothing(steps):
    feed = Feed(source(Counted(5)), steps_per_epoch=steps)
    assert list(feed.epoch()) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="given 5 batches"):
        next(feed.epoch())


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("data", [iter([]), lambda: iter([]), lambda: (x for x in [])])
def test_a_pass_without_batches_is_an_error(data, steps):
    with pytest.raises(DataError, match="train gave no batch in pass 1"):
        next(Feed(source(data), steps_per_epoch=steps).epoch())


def test_a_function_that_returns_a_used_iterator_is_an_error():
    used = iter([0, 1])
    feed = Feed(source(lambda: used), steps_per_epoch=2)
    assert list(feed.epoch()) == [0, 1]
    with pytest.raises(DataError, match="no batch in pass"):
        list(feed.epoch())


@pytest.mark.parametrize("steps", [None, 3])
def test_an_exhausted_loader_has_finished_its_epoch(steps):
    loader = DataLoader(range(6), batch_size=2, shuffle=True, seed=0)
    list(Feed(source(loader), steps_per_epoch=steps).epoch())
    assert loader.state_dict()["epoch"] == 1


def test_a_length_that_is_too_small_loses_no_batch():
    class Understated:
        def __iter__(self):
            return iter(range(5))

        def __len__(self):
            return 2

    feed = Feed(source(Understated()), steps_per_epoch=2)
    assert epochs(feed, 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize("data", [[0, 1, 2, 3], lambda: iter([0, 1, 2, 3])])
def test_each_evaluation_starts_from_the_top(data):
    replay = Replay(source(data), steps=2)
    assert [list(replay.batches()) for _ in range(3)] == [[0, 1]] * 3
    assert list(Replay(source(data)).batches()) == [0, 1, 2, 3]


def test_an_iterator_is_kept_and_replayed():
    replay = Replay(source(data := Counted()), steps=2)
    assert [list(replay.batches()) for _ in range(3)] == [[0, 1]] * 3
    assert data.drawn == 2


def test_an_evaluation_left_early_is_replayed_whole():
    replay = Replay(source(Counted(4)))
    assert next(replay.batches()) == 0
    assert [list(replay.batches()) for _ in range(2)] == [[0, 1, 2, 3]] * 2


def test_too_few_batches_are_evaluated_with_one_warning():
    replay = Replay(source([0, 1], name="val"), steps=5)
    with pytest.warns(UserWarning, match="val has 2 batches, fewer than the 5 steps") as warned:
        assert [list(replay.batches()) for _ in range(2)] == [[0, 1]] * 2
    assert len(warned) == 1


def test_an_evaluation_of_nothing_is_an_error():
    with pytest.raises(DataError, match="val gave no batch"):
        list(Replay(source(iter([]), name="val")).batches())


def test_closing_a_feed_ends_the_thread_of_a_pass_that_was_left():
    before, loader = threading.active_count(), DataLoader(range(40), 2, timeout=9)
    feed = Feed(source(loader), steps_per_epoch=3)
    list(feed.epoch())
    assert threading.active_count() == before + 1
    feed.close()
    assert threading.active_count() == before


def test_closing_a_feed_leaves_a_users_generator_open():
    numbers = (number for number in range(9))
    feed = Feed(source(numbers), steps_per_epoch=3)
    list(feed.epoch())
    feed.close()
    assert next(numbers) == 3
