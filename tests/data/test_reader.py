"""Where batches are made: in the caller's thread, or ahead of it."""

import threading
import time

import mlx.core as mx
import numpy as np
import pytest
import torch
import worker_datasets as sets
from worker_datasets import Stream

import mlx_fit.data.reader
from mlx_fit.data import DataLoader
from mlx_fit.errors import ConfigurationError, WorkerError


class Slow:
    """Rows that take a while; notes which were read, and where."""

    def __init__(self, n=40, seconds=0.001, make=int):
        self.n = n
        self.seconds = seconds
        self.make = make
        self.read = []
        self.threads = []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.read.append(index)
        self.threads.append(threading.current_thread() is threading.main_thread())
        time.sleep(self.seconds)
        return self.make(index)


class SlowStream:
    """The same rows, which can only be iterated over."""

    def __init__(self, n):
        self.data = Slow(n)

    def __iter__(self):
        yield from map(self.data.__getitem__, range(self.data.n))


def rows(loader):
    return [batch.tolist() for batch in loader]


def test_slow_batches_are_made_in_a_thread_after_two():
    loader = DataLoader(data := Slow(), 4, shuffle=True, seed=0)
    assert rows(loader) == rows(DataLoader(range(40), 4, shuffle=True, seed=0))
    assert data.threads == [True] * 8 + [False] * 32
    rows(loader)
    assert not any(data.threads[40:])  # the next epoch knows


def test_fast_batches_are_made_where_they_are_wanted(monkeypatch):
    monkeypatch.setattr(mlx_fit.data.reader, "_SLOW_S", 10.0)
    rows(DataLoader(data := Slow(), 4))
    assert all(data.threads)


def test_one_slow_batch_alone_starts_no_thread(monkeypatch):
    monkeypatch.setattr(mlx_fit.data.reader, "_SLOW_S", 0.02)

    class Sometimes(Slow):
        def __getitem__(self, index):
            self.seconds = 0.03 if index % 8 == 0 else 0.0
            return super().__getitem__(index)

    rows(DataLoader(data := Sometimes(24), 4))
    assert all(data.threads)


@pytest.mark.parametrize("prefetch_factor", [1, 2, 5])
def test_the_thread_waits_for_a_consumer_that_stopped(prefetch_factor):
    loader = DataLoader(data := Slow(100), 4, prefetch_factor=prefetch_factor)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    time.sleep(0.15)
    assert len(data.read) == 4 * (4 + prefetch_factor)
    assert loader.state_dict()["samples_consumed"] == 16


def test_the_time_that_the_consumer_waited_is_told():
    def waited(prefetch_factor):
        loader = DataLoader(Slow(40, 0.004), 4, prefetch_factor=prefetch_factor)
        assert loader.wait_seconds == 0
        for _ in loader:
            time.sleep(0.03)
        return loader.wait_seconds

    directly = waited(0)
    assert directly > 0.16
    assert waited(2) < directly


def test_prefetch_factor_0_stays_in_the_callers_thread():
    rows(DataLoader(data := Slow(), 4, prefetch_factor=0))
    assert all(data.threads)


@pytest.mark.parametrize("make", [lambda i: mx.array(i), lambda i: {"x": [mx.array(i)]}])
def test_mlx_rows_stay_in_the_callers_thread(make):
    list(DataLoader(data := Slow(16, make=make), 4))
    assert all(data.threads)


def test_a_collate_fn_that_makes_mlx_arrays_stays_in_the_callers_thread():
    loader = DataLoader(data := Slow(16), 4, collate_fn=lambda samples: mx.array(samples) * 2)
    assert [batch.tolist()[0] for batch in loader] == [0, 8, 16, 24]
    assert all(data.threads)


def test_lazy_mlx_arrays_that_a_dataset_hides_are_read_in_the_callers_thread():
    tables = [mx.arange(2) * index for index in range(16)]  # lazy, and of this thread
    loader = DataLoader(data := Slow(16, make=lambda i: np.array(tables[i] + 1)), 4)
    expected = np.stack([np.arange(2) * index + 1 for index in range(16)])
    np.testing.assert_array_equal(np.concatenate(list(loader)), expected)
    assert len(data.read) > 16  # some were tried in the thread first
    count = len(data.read)
    np.testing.assert_array_equal(np.concatenate(list(loader)), expected)
    assert data.threads[count:] == [True] * 16


def test_an_error_in_the_thread_comes_in_its_turn():
    def fail(index):
        return {"i": index}["i" if index != 37 else "from"]

    seen = []
    with pytest.raises(KeyError, match="from") as caught:
        seen.extend(batch.tolist() for batch in DataLoader(Slow(40, make=fail), 4))
    assert len(seen) == 9
    assert "sample 37 (epoch 0, batch 9" in caught.value.__notes__[0]


def test_a_hanging_read_is_named_after_the_timeout():
    release = threading.Event()
    data = Slow(40, 0, make=lambda index: release.wait() if index == 37 else index)
    iterator = iter(DataLoader(data, 4, timeout=1.5))
    for _ in range(9):
        next(iterator)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"1.5 s .*\[36, 37, 38, 39\]") as caught:
        next(iterator)
    assert 1 < time.monotonic() - start < 30
    assert caught.value.indices == [36, 37, 38, 39]
    release.set()
    for thread in threading.enumerate():
        if thread.name == "mlx_fit.data":
            thread.join()


def test_leaving_early_ends_the_thread():
    loader, before = DataLoader(Slow(400, 0.0003), 4, seed=0), threading.active_count()
    for count in range(50):
        for taken, _ in enumerate(loader):
            if taken == count % 5:
                break
        assert threading.active_count() == before


def test_two_iterators_read_ahead_apart():
    loader = DataLoader(Slow(), 4, shuffle=True, seed=0)
    assert all((a == b).all() for a, b in zip(loader, loader, strict=True))


def test_a_slow_stream_is_read_ahead_and_each_row_once():
    stream = SlowStream(42)
    loader, data = DataLoader(stream, 4), stream.data
    expected = [list(range(n, min(n + 4, 42))) for n in range(0, 42, 4)]
    assert rows(loader) == rows(loader) == expected
    assert data.read == list(range(42)) * 2
    assert not all(data.threads)


def test_an_iterator_is_never_read_ahead():
    drawn = []

    def slowly():
        for index in range(100):
            time.sleep(0.001)
            drawn.append(index)
            yield index

    iterator = iter(DataLoader(slowly(), 4))
    for _ in range(5):
        next(iterator)
    time.sleep(0.02)
    assert len(drawn) == 20


def test_a_stateful_stream_that_is_read_ahead_saves_what_was_handed_out():
    class SlowStateful(sets.StatefulStream):
        def __iter__(self):
            for row in super().__iter__():
                time.sleep(0.001)
                yield row

    loader = DataLoader(stream := SlowStateful(40), 4)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    time.sleep(0.05)
    assert stream.num_read > 20
    resumed = DataLoader(SlowStateful(40), 4)
    resumed.load_state_dict(loader.state_dict())
    assert rows(resumed)[0] == [20, 21, 22, 23]


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_workers": 1.0}, "num_workers=1.0"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": True}, "timeout=True"),
        ({"worker_init_fn": 3, "num_workers": 1}, "worker_init_fn is a int"),
        ({"worker_init_fn": print}, "worker_init_fn needs num_workers"),
        ({"prefetch_factor": -1}, "prefetch_factor=-1"),
        ({"prefetch_factor": 0, "num_workers": 1}, "prefetch_factor=0"),
        ({"prefetch_factor": 0, "timeout": 1}, "prefetch_factor=0"),
        ({"persistent_workers": True}, "persistent_workers=True needs num_workers"),
        ({"persistent_workers": 1}, "persistent_workers=1"),
        ({"pin_memory": None}, "pin_memory=None"),
        ({"generator": 3}, "generator is a int"),
        ({"generator": np.random.default_rng(0), "seed": 0}, "seed and generator"),
    ],
)
def test_arguments_that_cannot_work_or_have_no_effect_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        DataLoader(range(4), **options)


def test_the_arguments_have_the_order_of_the_contract():
    loader = DataLoader(
        Stream(4), 2, False, None, None, 0, list, True, 0, None, None, None, False, True, 7
    )
    assert (loader.drop_last, loader.pin_memory, loader.seed) == (True, True, 7)
    assert list(loader) == [[0, 1], [2, 3]]


def test_a_generator_gives_the_seed():
    def order_of(generator):
        return rows(DataLoader(range(20), 4, shuffle=True, generator=generator))

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert order_of(seeded(3)) == order_of(seeded(3)) != order_of(seeded(4))
    rng = np.random.default_rng(0)
    assert order_of(rng) == order_of(np.random.default_rng(0)) != order_of(rng)
