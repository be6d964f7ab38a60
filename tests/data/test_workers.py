"""Worker processes: the same batches, exact errors, nothing left behind."""

import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import worker_datasets as sets
from worker_datasets import Rows, StatefulStream, Stream

from mlx_fit import Trainer
from mlx_fit.data import DataLoader, Map
from mlx_fit.errors import ConfigurationError, DataError, WorkerError


def rows(loader):
    return [batch.tolist() for batch in loader]


def left_overs():
    gc.collect()
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    segments = {name for name in names if name.startswith("psm_")}
    return set(multiprocessing.active_children()), threading.active_count(), segments, files


@pytest.fixture
def nothing_left():
    list(DataLoader(range(2), num_workers=1))  # starts the resource tracker, which stays
    before = left_overs()
    yield
    # Threads of earlier tests may still end, and other programs use the shared memory, too.
    deadline = time.monotonic() + 30
    while not (is_over := all(n <= m for n, m in zip(left_overs(), before, strict=True))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert is_over, (left_overs(), before)


# --- batches -------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_batches_epoch_after_epoch(nothing_left):
    epochs = []
    for num_workers in (0, 1, 3):
        data = Map(range(11), sets.noisy)
        loader = DataLoader(data, 2, True, num_workers=num_workers, seed=5)
        epochs.append([rows(loader), rows(loader)])
        assert loader.state_dict()["epoch"] == 2
    assert epochs[0] == epochs[1] == epochs[2]
    drawn = [index + np.random.default_rng([5, 0, index]).random() for index in range(11)]
    np.testing.assert_allclose(sorted(np.concatenate(epochs[2][0])), drawn, rtol=1e-6)


def test_large_batches_travel_in_memory_of_their_own(nothing_left):
    data = Rows(sets.large, 24)
    loader = DataLoader(data, 3, num_workers=2, prefetch_factor=1)
    kept = list(loader)
    for batch, expected in zip(kept, DataLoader(data, 3), strict=True):
        np.testing.assert_array_equal(batch["x"], expected["x"])
        assert batch["x"].dtype == np.float32
        batch["x"][:] = -1  # no other batch may change, nor the workers' memory
    np.testing.assert_array_equal(kept[-1]["i"], [21, 22, 23])


def test_a_worker_does_not_import_mlx():
    assert rows(DataLoader(Map(Rows(sets.has_mlx, 2), sets.noisy), 2, num_workers=1))[0][0] < 1


def test_structures_and_strings_pass_as_they_are():
    loader = DataLoader(Rows(sets.strings, 4), 2, num_workers=1, collate_fn=sets.as_list)
    assert [row["text"] for batch in loader for row in batch] == ["0", "1", "2", "3"]


def test_a_state_does_not_know_the_number_of_workers():
    def make(num_workers):
        return DataLoader(range(40), 4, True, num_workers=num_workers, seed=0)

    whole, loader = rows(make(0)), make(2)
    iterator = iter(loader)
    assert [next(iterator).tolist() for _ in range(3)] == whole[:3]
    state = loader.state_dict()
    assert state["samples_consumed"] == 12  # not what was read ahead
    del iterator
    for num_workers in (0, 1, 4):
        resumed = make(num_workers)
        resumed.load_state_dict(state)
        assert rows(resumed) == whole[3:]


def test_worker_init_fn_runs_in_each_worker():
    loader = DataLoader(
        Rows(sets.worker_number, 6), 1, num_workers=2, worker_init_fn=sets.set_worker
    )
    assert rows(loader) == [[0], [1], [0], [1], [0], [1]]


def test_global_generators_differ_by_worker_and_epoch_and_repeat_with_the_seed():
    def draws(seed):
        loader = DataLoader(Rows(sets.global_draws, 4), 1, num_workers=2, seed=seed)
        return [(a.item(), b.item()) for _ in range(2) for a, b, _ in loader]

    first = draws(7)
    assert len(set(first)) == 8
    assert draws(7) == first


def test_persistent_workers_live_on_and_can_be_left_early(nothing_left):
    loader = DataLoader(Rows(sets.global_draws), 4, num_workers=2, persistent_workers=True, seed=0)
    processes = {pid for _, _, ids in loader for pid in ids.tolist()}
    for _ in range(50):
        for *_, ids in loader:
            processes |= set(ids.tolist())
            break
    assert len(processes) == len(multiprocessing.active_children()) == 2
    del loader


def test_persistent_workers_serve_the_whole_epoch_after_one_left_early():
    loader = DataLoader(Rows(sets.large), 4, num_workers=2, persistent_workers=True)
    for _ in range(3):
        next(iter(loader))
    expected = DataLoader(Rows(sets.large), 4)
    for ours, theirs in zip(loader, expected, strict=True):
        np.testing.assert_array_equal(ours["x"], theirs["x"])


def test_two_iterators_of_persistent_workers_are_apart(nothing_left):
    loader = DataLoader(range(12), 4, num_workers=1, persistent_workers=True)
    assert all((a == b).all() for a, b in zip(loader, loader, strict=True))
    del loader


def test_fit_gives_the_same_bits_with_workers_also_resumed_in_mid_epoch(tmp_path, nothing_left):
    def fit(num_workers, **options):
        mx.random.seed(0)
        trainer = Trainer(nn.Linear(2, 1), optim.Adam(0.01), "mse")
        data = Map(Rows(sets.pair, 22), sets.noisy_pair)
        loader = DataLoader(data, 4, True, num_workers=num_workers, seed=1)
        trainer.fit(loader, epochs=2, verbose=0, checkpoint_dir=tmp_path / "run", **options)
        return trainer.model.weight.tolist()

    fit(2, max_steps=8, resume="auto")  # in the second epoch
    resumed = fit(1, resume="auto")
    shutil.rmtree(tmp_path / "run")
    assert fit(0) == resumed


def test_a_term_signal_to_the_group_leaves_the_workers_to_their_parent():
    loader = DataLoader(Rows(sets.global_draws, 12), 4, num_workers=1, prefetch_factor=1)
    iterator = iter(loader)
    pid = next(iterator)[2][0].item()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert len(list(iterator)) == 2


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_each_row_of_a_stream_is_given_once(num_workers):
    loader = DataLoader(Stream(10), 4, num_workers=num_workers)
    assert rows(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert rows(loader)[0] == [100, 101, 102, 103]  # the epoch reached the process


def test_a_stream_in_a_process_resumes_with_one_warning():
    loader = DataLoader(Stream(10), 4, num_workers=2)
    loader.load_state_dict({**loader.state_dict(), "samples_consumed": 4})
    with pytest.warns(UserWarning, match="first 4 rows") as warned:
        assert rows(loader) == [[4, 5, 6, 7], [8, 9]]
    assert len(warned) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stateful_stream_goes_to_its_place(num_workers):
    loader = DataLoader(StatefulStream(10), 2, num_workers=num_workers)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    assert state["dataset_state"] == {"next": 4}
    resumed = DataLoader(stream := StatefulStream(10), 2, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert rows(resumed) == [[4, 5], [6, 7], [8, 9]]
    assert stream.num_read == (0 if num_workers else 6)
    assert rows(resumed)[0] == [0, 1]


# --- errors --------------------------------------------------------------------------------------


def test_a_failing_row_is_raised_as_it_is_with_index_batch_and_worker(nothing_left):
    seen = []
    with pytest.raises(KeyError, match="from") as caught:
        seen.extend(rows_until(DataLoader(Rows(sets.missing_field), 4, num_workers=2)))
    assert seen == rows(DataLoader(range(36), 4))
    where, trace = caught.value.__notes__
    assert where == "While reading sample 37 (epoch 0, batch 9, counted from 0)."
    assert trace.startswith("Raised in worker 1 (process ")
    assert "in missing_field" in trace


def rows_until(loader):
    for batch in loader:
        yield batch.tolist()


def test_an_error_that_cannot_be_pickled_keeps_its_type():
    with pytest.raises(sets.OddError, match=r"odd \(3\)") as caught:
        list(DataLoader(Rows(sets.odd_error), 4, num_workers=1))
    assert "sample 0" in caught.value.__notes__[0]


def test_a_killed_worker_is_named_with_what_it_had(nothing_left):
    start, seen = time.monotonic(), []
    with pytest.raises(WorkerError, match=r"Worker 1 .* signal 9 \(SIGKILL\)") as caught:
        seen.extend(rows_until(DataLoader(Rows(sets.killed), 4, num_workers=2)))
    error = caught.value
    assert (error.worker, error.signal, error.batch) == (1, 9, 9)
    assert error.indices == [36, 37, 38, 39]
    assert len(seen) == 9
    assert time.monotonic() - start < 20
    del caught, error


def test_a_worker_that_exits_is_an_error():
    with pytest.raises(WorkerError, match=r"Worker 0 .* exited with 3") as caught:
        list(DataLoader(Rows(sets.exits), 4, num_workers=1))
    assert caught.value.exit_code == 3


def test_a_stuck_worker_is_named_after_the_timeout(nothing_left):
    loader = DataLoader(Rows(sets.hangs), 4, num_workers=2, timeout=4)
    iterator = iter(loader)
    for _ in range(9):
        next(iterator)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"gave no batch for 4 s .*\[36, 37, 38, 39\]"):
        next(iterator)
    assert 3 < time.monotonic() - start < 40


@pytest.mark.parametrize("options", [{}, {"collate_fn": sets.mlx_batch}])
def test_mlx_arrays_are_refused_in_a_process(options):
    data = range(4) if options else Rows(sets.mlx_row)
    with pytest.raises(DataError, match="Return NumPy"):
        list(DataLoader(data, 2, num_workers=1, **options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"collate_fn": lambda samples: samples}, "collate_fn"),
        ({"worker_init_fn": lambda worker: None}, "worker_init_fn"),
        ({"dataset": (i for i in range(3))}, "dataset"),
    ],
)
def test_what_cannot_be_pickled_is_named(options, named, nothing_left):
    loader = DataLoader(**{"dataset": range(4), "num_workers": 2, **options})
    with pytest.raises(ConfigurationError, match=f"needs a {named} that can be pickled"):
        next(iter(loader))


def test_a_failing_worker_init_fn_is_raised(nothing_left):
    with pytest.raises(OSError, match="no such device") as caught:
        list(DataLoader(range(4), num_workers=2, worker_init_fn=sets.bad_init))
    assert "worker 0" in caught.value.__notes__[0]
    del caught


def test_a_failing_sampler_is_raised_after_the_batches_before_it():
    def sampler():
        yield from range(5)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(rows_until(DataLoader(range(9), 2, sampler=sampler(), num_workers=2)))
    assert seen == [[0, 1], [2, 3]]


# --- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_times", "options"),
    # A process takes half a second to start; tests/soak_loader.py has the patience for 50.
    [(50, {}), (50, {"timeout": 9}), (10, {"num_workers": 1})],
    ids=["in place", "thread", "process"],
)
def test_leaving_early_leaves_nothing(num_times, options, nothing_left):
    """The fixture compares threads, processes, files and shared memory afterwards."""
    for count in range(num_times):
        iterator = iter(DataLoader(Rows(sets.large), 4, **options))
        taken = list(itertools.islice(iterator, count % 4 + 1))
        assert len(taken) == count % 4 + 1  # it had begun, or there would be nothing to leave
        del iterator


def test_workers_end_also_when_the_consumer_raises(nothing_left):
    def consume():
        for _ in DataLoader(Rows(sets.large), 4, num_workers=2):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        consume()
    assert caught.value.__traceback__ is not None  # which holds on to the frame


def run_script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    folder = os.path.dirname(sets.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), folder])}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=60
    )


def test_an_interpreter_that_ends_in_the_middle_of_a_pass_leaves_nothing(tmp_path):
    done = run_script(
        tmp_path,
        """
        import worker_datasets as sets
        from mlx_fit import DataLoader
        if __name__ == "__main__":
            loader = DataLoader(sets.Rows(sets.large), 4, num_workers=2, persistent_workers=True)
            iterator = iter(loader)
            print(next(iterator)["i"].tolist(), next(iterator)["i"].tolist())
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[0, 1, 2, 3] [4, 5, 6, 7]\n"


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    done = run_script(
        tmp_path,
        """
        from mlx_fit import DataLoader
        list(DataLoader(range(4), num_workers=1))
        """,
    )
    assert done.returncode == 1
    assert 'under if __name__ == "__main__":' in done.stderr
