"""Properties of every position: what was consumed and what is left make the uninterrupted run."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fit.data import DataLoader, order
from mlx_fit.errors import ResumeError


@st.composite
def runs(draw):
    n = draw(st.integers(1, 50))
    drop_last = draw(st.booleans())
    batch_size = draw(st.integers(1, n if drop_last else 60))
    set_up = {"batch_size": batch_size, "drop_last": drop_last, "shuffle": draw(st.booleans())}
    return n, {**set_up, "seed": draw(st.integers(0, 2**40))}


def rows(iterator):
    return [batch.tolist() for batch in iterator]


def take(iterator, count):
    return [next(iterator).tolist() for _ in range(count)]


def expected_epoch(n, epoch, *, batch_size, drop_last, shuffle, seed):
    visited = order(seed, epoch, n).tolist() if shuffle else list(range(n))
    batches = [visited[start : start + batch_size] for start in range(0, n, batch_size)]
    return [batch for batch in batches if len(batch) == batch_size or not drop_last]


def fresh(n, set_up, state):
    loader = DataLoader(range(n), **set_up)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(0, 3))
def test_uninterrupted_epochs_follow_the_order(run, num_epochs):
    n, set_up = run
    loader = DataLoader(range(n), **set_up)
    for epoch in range(num_epochs):
        assert rows(loader) == expected_epoch(n, epoch, **set_up)
        assert loader.state_dict()["epoch"] == epoch + 1


@settings(max_examples=100, deadline=None)
@given(runs(), st.integers(0, 2), st.data())
def test_any_number_of_stops_leaves_the_sequence_unchanged(run, epoch, data):
    n, set_up = run
    loader = DataLoader(range(n), **set_up)
    loader.set_epoch(epoch)
    whole, seen = expected_epoch(n, epoch, **set_up), []
    for _ in range(data.draw(st.integers(1, 3))):
        seen += take(iter(loader), data.draw(st.integers(0, len(whole) - len(seen))))
        loader = fresh(n, set_up, loader.state_dict())
    assert seen + rows(loader) == whole
    assert rows(loader) == expected_epoch(n, epoch + 1, **set_up)


@settings(max_examples=60, deadline=None)
@given(runs(), st.data())
def test_an_iterator_left_anywhere_starts_again_from_the_top(run, data):
    n, set_up = run
    loader, whole = DataLoader(range(n), **set_up), expected_epoch(n, 0, **set_up)
    take(iter(loader), data.draw(st.integers(0, len(whole))))
    loader = fresh(n, set_up, loader.state_dict())
    num_left = len(whole) - loader.state_dict()["samples_consumed"] // set_up["batch_size"]
    take(iter(loader), data.draw(st.integers(0, max(num_left - 1, 0))))
    assert rows(loader) == whole
    assert rows(loader) == expected_epoch(n, 1, **set_up)


@pytest.mark.parametrize("value", [-1, "3", 1.5, None, True])
@pytest.mark.parametrize("field", ["epoch", "samples_consumed"])
def test_a_state_whose_position_is_no_number_is_refused(field, value):
    loader = DataLoader(range(10), 2)
    with pytest.raises(ResumeError, match=f"{field}={value!r} in a DataLoader state is no pos"):
        loader.load_state_dict({**loader.state_dict(), field: value})


def test_a_state_behind_the_last_sample_is_refused():
    loader = DataLoader(range(10), 4)
    with pytest.raises(ResumeError, match=r"samples_consumed=12 .* the data has 10 samples"):
        loader.load_state_dict({**loader.state_dict(), "samples_consumed": 12})
