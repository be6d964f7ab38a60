"""A folder of checkpoints: what is kept, what is found, what is never deleted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import (
    Callback,
    CheckpointPolicy,
    CheckpointWriteError,
    ConfigurationError,
    ModelCheckpoint,
    NonFiniteLossError,
    TerminateOnNaN,
    Trainer,
    UnknownMonitorError,
)
from mlx_fit.checkpoint import arrays, store
from mlx_fit.checkpoint.store import CheckpointStore


def trainer_of(losses=None):
    """A trainer of 2 steps an epoch; ``losses`` are those of its epochs."""
    mx.random.seed(1)
    model = nn.Linear(3, 1)
    mx.eval(model.parameters())
    return Trainer(model, optim.SGD(0.0 if losses else 0.01), "mse", batch_size=2, seed=0)


X = np.ones((4, 3), np.float32), np.zeros((4, 1), np.float32)


class Says(Callback):
    """Logs given values as ``score``, one an epoch."""

    def __init__(self, values):
        self.values = values

    def on_epoch_end(self, epoch, logs):
        logs["score"] = self.values[epoch]


def fit(directory, policy="epoch", epochs=3, callbacks=(), **more):
    arguments = {"epochs": epochs, "verbose": 0, "callbacks": callbacks, **more}
    return trainer_of().fit(X, checkpoint_dir=directory, checkpoint_every=policy, **arguments)


def steps_in(directory):
    return sorted(int(path.name[5:]) for path in directory.iterdir() if path.name[0] != ".")


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("keep", "kept"), [(-1, 6), (None, 6), (1, 1), (2, 2), (3, 3), (4, 4), (9, 6)]
)
def test_the_newest_are_kept(tmp_path, keep, kept, background):
    fit(tmp_path, CheckpointPolicy(keep_last=keep, background=background), epochs=6)
    assert steps_in(tmp_path) == [2, 4, 6, 8, 10, 12][-kept:]


@pytest.mark.parametrize(
    ("best", "last", "epochs"),
    [
        (1, 1, [4]),
        (2, 1, [2, 4]),
        (3, 1, [2, 3, 4]),
        (4, 1, [1, 2, 3, 4]),
        (1, 2, [3, 4]),
        (9, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_the_best_are_kept_besides(tmp_path, best, last, epochs):
    policy = CheckpointPolicy(keep_last=last, keep_best=best, monitor="score", mode="min")
    fit(tmp_path, policy, epochs=5, callbacks=Says([10, 9, 2.8, 5, 2.5]))
    assert steps_in(tmp_path) == [2 * (epoch + 1) for epoch in epochs]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([3, 0.0, 1], [4, 6]),  # 0.0 is a value
        ([3, float("nan"), 4], [2, 6]),  # NaN is worst
        ([1, 1, 1], [2, 6]),  # the first of equals
    ],
)
def test_which_value_is_best(tmp_path, scores, kept):
    policy = CheckpointPolicy(keep_last=1, keep_best=1, monitor="score", mode="min")
    fit(tmp_path, policy, callbacks=Says(scores))
    assert steps_in(tmp_path) == kept


def test_a_direction_comes_from_the_metric(tmp_path):
    class Falls(Says):
        def on_epoch_end(self, epoch, logs):
            logs["loss"] = self.values[epoch]

    policy = CheckpointPolicy(keep_last=1, keep_best=1, monitor="loss")
    fit(tmp_path, policy, callbacks=Falls([3, 1, 2]))
    assert steps_in(tmp_path) == [4, 6]


def test_a_value_that_does_not_exist_is_named(tmp_path):
    policy = CheckpointPolicy(keep_best=1, monitor="val_acuracy", mode="max")
    with pytest.raises(UnknownMonitorError, match="val_acuracy"):
        fit(tmp_path, policy)


def test_step_checkpoints_come_at_exactly_their_steps(tmp_path):
    fit(tmp_path, CheckpointPolicy("3 steps", keep_last=None), epochs=5)
    assert steps_in(tmp_path) == [3, 6, 9, 10]


def test_epochs_in_pairs(tmp_path):
    fit(tmp_path, CheckpointPolicy("2 epochs", keep_last=None), epochs=5)
    assert steps_in(tmp_path) == [4, 8, 10]


def test_a_time_is_looked_at_after_each_step(tmp_path):
    fit(tmp_path, CheckpointPolicy("0.000001 seconds", keep_last=None), epochs=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    fit(tmp_path / "long", CheckpointPolicy("1 hour", keep_last=None), epochs=2)
    assert steps_in(tmp_path / "long") == [4]


def test_two_reasons_at_one_step_save_once(tmp_path, monkeypatch):
    saved = []
    write = store.write_checkpoint
    monkeypatch.setattr(
        store,
        "write_checkpoint",
        lambda folder, snapshot, hashes: (
            saved.append(snapshot.document["step"]),
            write(folder, snapshot, hashes),
        ),
    )
    fit(tmp_path, "epoch", epochs=2)
    assert saved == [2, 4]


@pytest.mark.parametrize(
    "every",
    ["", "epochs", "0 steps", "-1 steps", "1.5 steps", "5", 5, None, "5 parsecs", "nan minutes"],
)
def test_when_to_save_is_checked(every):
    with pytest.raises(ConfigurationError, match="checkpoint_every"):
        CheckpointPolicy(every)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_last": 0},
        {"keep_last": -2},
        {"keep_last": 1.5},
        {"keep_best": -1},
        {"keep_best": 1},
        {"monitor": "loss"},
        {"mode": "min"},
        {"background": "yes"},
        {"frozen": "no"},
        {"keep_best": 1, "monitor": "loss", "mode": "best"},
    ],
)
def test_a_policy_is_checked(wrong):
    with pytest.raises(ConfigurationError):
        CheckpointPolicy(**wrong)


# --- what is found -------------------------------------------------------------------------------


def test_a_damaged_newest_is_named_once_and_the_one_before_used(tmp_path):
    fit(tmp_path)
    (tmp_path / "step-00000006" / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000006.*step-00000004 is used") as caught:
        history = fit(tmp_path, resume="auto")
    assert len([w for w in caught if "Skipped" in str(w.message)]) == 1
    assert history.epoch == [0, 1, 2]


@pytest.mark.parametrize("background", [True, False])
def test_a_damaged_newest_does_not_cost_the_ones_that_are_whole(tmp_path, background):
    policy = CheckpointPolicy("2 steps", keep_last=None)
    fit(tmp_path, policy)
    (tmp_path / "step-00000006" / "model.safetensors").write_bytes(b"damaged")
    policy = CheckpointPolicy("2 steps", keep_last=1, background=background)
    with pytest.warns(UserWarning, match="step-00000004 is used"):
        fit(tmp_path, policy, max_steps=5, resume="auto")
    assert steps_in(tmp_path) == [5, 6]
    with pytest.warns(UserWarning, match="step-00000005 is used"):
        fit(tmp_path, policy, resume="auto")
    assert steps_in(tmp_path) == [6]


def test_going_back_to_an_older_checkpoint_names_the_newer_ones(tmp_path):
    fit(tmp_path, "2 steps")
    policy = CheckpointPolicy("2 steps", keep_last=1)
    with pytest.warns(UserWarning, match="holds step-00000004, step-00000006, newer"):
        fit(tmp_path, policy, max_steps=3, resume=tmp_path / "step-00000002")
    assert steps_in(tmp_path) == [3, 4, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, policy, resume=tmp_path / "step-00000006")


def test_numbers_are_compared_as_numbers(tmp_path):
    fit(tmp_path, CheckpointPolicy(keep_last=None))
    (tmp_path / "step-00000006").rename(tmp_path / "step-100000000")
    assert list(CheckpointStore(tmp_path).steps()) == [2, 4, 100000000]


def test_left_overs_of_a_killed_run_are_cleared_up(tmp_path):
    fit(tmp_path)
    staged = tmp_path / f".tmp-step-00000008-{'a' * 16}"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-notes").write_text("mine")
    fit(tmp_path, epochs=4, resume=True)
    assert not staged.exists()
    assert (tmp_path / ".tmp-notes").read_text() == "mine"


def test_a_checkpoint_that_was_moved_aside_returns(tmp_path):
    fit(tmp_path)
    (tmp_path / "step-00000006").rename(tmp_path / f".old-step-00000006-{'b' * 16}")
    assert fit(tmp_path, resume=True).epoch == [0, 1, 2]
    assert steps_in(tmp_path)[-1] == 6
    folder = tmp_path / "best"
    trainer_of().save(folder)
    folder.rename(tmp_path / f".old-best-{'c' * 16}")
    trainer_of().load(folder)


def test_a_users_files_survive_everything(tmp_path):
    policy = CheckpointPolicy(keep_last=1, background=False)  # no folder goes while one is written

    class Leaves(Callback):
        def on_epoch_begin(self, epoch, logs):
            for path in tmp_path.glob("step-*"):
                (path / "notes.txt").write_text(path.name)

    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-00000099" / "diary.txt").write_text("dear")
    fit(tmp_path, policy, epochs=3, callbacks=Leaves())
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "step-00000002" / "notes.txt").read_text() == "step-00000002"
    assert not (tmp_path / "step-00000002" / "model.safetensors").exists()
    assert (tmp_path / "step-00000099" / "diary.txt").read_text() == "dear"
    assert fit(tmp_path, policy, epochs=4, resume=True).epoch == [0, 1, 2, 3]


def test_a_folder_can_be_moved(tmp_path):
    fit(tmp_path / "here", callbacks=ModelCheckpoint(tmp_path / "best", keep=1))
    (tmp_path / "here").rename(tmp_path / "there")
    checkpoint = ModelCheckpoint(tmp_path / "best", keep=1)
    assert fit(tmp_path / "there", epochs=4, callbacks=checkpoint, resume=True).epoch[-1] == 3


# --- writing that fails --------------------------------------------------------------------------


def no_space(after):
    """``os.write`` of arrays that fails after so many calls, as on a full disk."""
    append = arrays._append

    def full(file, digest, data):
        nonlocal after
        after -= 1
        if after < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(file, digest, data)

    return full


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("after", [8, 9, 12])
def test_a_full_disk_leaves_the_one_before_and_is_told(tmp_path, monkeypatch, background, after):
    monkeypatch.setattr(arrays, "_append", no_space(after))
    with pytest.raises(CheckpointWriteError, match="No space left") as raised:
        fit(tmp_path, CheckpointPolicy(keep_last=1, background=background), epochs=2)
    assert raised.value.__cause__.errno == errno.ENOSPC
    monkeypatch.undo()
    assert steps_in(tmp_path) == [2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert fit(tmp_path, epochs=2, resume=True).epoch == [0, 1]


@pytest.mark.parametrize("directory", ["", 5, True])
def test_a_checkpoint_dir_that_is_no_folders_name_is_refused(directory):
    with pytest.raises(ConfigurationError, match="checkpoint_dir="):
        fit(directory)


def test_a_limit_of_the_system_leaves_the_one_before_and_is_told(tmp_path):
    """The kernel refuses to write: a quota of file size, as ``ulimit -f`` sets it."""
    code = """
import resource, sys
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, numpy as np
from mlx_fit import CheckpointWriteError, Trainer
x = np.ones((4, 64), np.float32)
trainer = Trainer(nn.Linear(64, 64), optim.SGD(0.01), "mse", batch_size=4, seed=0)
trainer.fit((x, x), epochs=1, verbose=0, checkpoint_dir=sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    trainer.fit((x, x), epochs=3, verbose=0, checkpoint_dir=sys.argv[1], resume=True)
except CheckpointWriteError as error:
    print(type(error.__cause__).__name__, error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "File too large" in done.stdout, done.stdout + done.stderr
    assert steps_in(tmp_path) == [1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_dir_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="could not be written"):
        fit(tmp_path / "file")


def test_one_failing_delete_is_a_warning_and_later_ones_still_happen(tmp_path, monkeypatch):
    unlink = Path.unlink

    def stubborn(self, missing_ok=False):
        if self.parent.name == "step-00000002":
            raise OSError("stubborn")
        return unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", stubborn)
    with pytest.warns(UserWarning, match=r"step-00000002 could not be deleted"):
        fit(tmp_path, CheckpointPolicy(keep_last=1, background=False), epochs=4)
    assert [s for s in steps_in(tmp_path) if s != 2] == [8]


def test_non_finite_weights_are_not_saved(tmp_path):
    class Poison(Callback):
        def on_epoch_end(self, epoch, logs):
            if epoch == 1:
                self.model.weight = self.model.weight * float("nan")

    with pytest.raises(NonFiniteLossError, match="weight"):
        fit(tmp_path, epochs=2, callbacks=Poison())
    assert steps_in(tmp_path) == [2]


def test_terminate_on_nan_ends_quietly_with_the_last_good_checkpoint(tmp_path):
    x = X[0].copy()

    def batches():
        yield x, X[1]
        yield x * np.float32(np.inf), X[1]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer_of().fit(
            batches,
            epochs=3,
            verbose=0,
            checkpoint_dir=tmp_path,
            checkpoint_every="1 steps",
            callbacks=TerminateOnNaN(),
        )
    assert history.stopped_by == "TerminateOnNaN"
    assert steps_in(tmp_path) == [1]
    assert any("NaN or infinity" in str(w.message) for w in caught)


# --- ModelCheckpoint on a folder -----------------------------------------------------------------


@pytest.mark.parametrize("path", ["best.ckpt", "best.npz", "a/b.pt"])
def test_another_suffix_is_refused_and_both_kinds_are_named(path):
    with pytest.raises(ConfigurationError, match=r"\.safetensors.*folder"):
        ModelCheckpoint(path)


def test_folders_are_kept_like_files(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "{epoch:02d}-{loss:.3f}", keep=2)
    trainer_of().fit(X, epochs=4, verbose=0, callbacks=checkpoint)
    assert [path.name[:2] for path in sorted(tmp_path.iterdir())] == ["03", "04"]
    assert checkpoint.last_path == sorted(tmp_path.iterdir())[-1]


@pytest.mark.parametrize(("path", "weights_only"), [("a", True), ("a.safetensors", False)])
def test_the_path_says_what_is_saved(path, weights_only):
    with pytest.raises(ConfigurationError, match="save_weights_only"):
        ModelCheckpoint(path, save_weights_only=weights_only)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "thesis.txt").write_text("all of it")
    with pytest.raises(CheckpointWriteError, match="is no checkpoint"):
        trainer_of().save(tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
