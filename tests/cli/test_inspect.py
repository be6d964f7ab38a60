"""``mlx-fit inspect``: what a checkpoint holds, whether it is sound, how two of them differ."""

from __future__ import annotations

import hashlib
import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_fit import Callback, CheckpointPolicy, Trainer
from mlx_fit.checkpoint.format import read_document
from mlx_fit.cli import main

DATA = np.ones((4, 3), np.float32), np.zeros((4, 1), np.float32)


class Infinite(Callback):
    """Has a state that is not finite."""

    def __init__(self):
        self.best = mx.full((2,), np.inf)

    def on_epoch_end(self, epoch, logs):
        self.best = mx.array([np.inf, epoch])

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]


@pytest.fixture
def folder(tmp_path):
    """Checkpoints after the steps 2 and 4 of a run of two epochs."""
    mx.random.seed(1)
    trainer = Trainer(nn.Linear(3, 1), optim.Adam(0.01), "mse", batch_size=2, seed=0)
    policy = CheckpointPolicy("2 steps")
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": policy, "verbose": 0}
    trainer.fit(DATA, epochs=2, callbacks=Infinite(), **options)
    return tmp_path


def inspect(capsys, *arguments):
    """Exit code and what was printed, each run of blanks as one."""
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, re.sub(r"\s+", " ", captured.out + captured.err)


def test_a_folder_is_listed_with_steps_and_values(folder, capsys):
    code, text = inspect(capsys, folder)
    loss = read_document(folder / "step-00000004")["values"]["loss"]
    assert code == 0
    assert re.search(rf"step-00000002 2 0 .* step-00000004 4 1 .*loss {loss:.4g}", text)


def test_one_checkpoint_is_shown_with_every_file_and_hash(folder, capsys):
    place = folder / "step-00000004"
    code, text = inspect(capsys, place, "--arrays")
    assert code == 0
    assert "step 4" in text
    assert "after epoch 1" in text
    assert "optimizer='Adam'" in text
    assert f"mlx {mx.__version__}" in text
    assert "weight 12 B float32 (1, 3)" in text
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() in text.replace(" ", "")
    assert "Every hash agrees" in text


def test_a_damaged_one_is_told_by_name_and_exit_code(folder, capsys):
    place = folder / "step-00000004" / "model.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    code, text = inspect(capsys, folder)
    assert code == 1
    assert re.search(r"step-00000004 DAMAGED: .*SHA-256", text)
    code, text = inspect(capsys, place.parent)
    assert code == 1
    assert "model.safetensors is damaged" in text


def test_two_are_compared_by_name_and_largest_difference(folder, capsys):
    one, other = folder / "step-00000002", folder / "step-00000004"
    code, text = inspect(capsys, one, other)
    a, b = (load_file(place / "model.safetensors") for place in (one, other))
    assert code == 1
    for name in ("weight", "bias"):
        assert f"model: {name} {np.abs(a[name] - b[name]).max():.6g}" in text
    assert "step: 2 and 4" in text
    code, text = inspect(capsys, one, one)
    assert (code, "0 differ" in text) == (0, True)


def test_of_a_folder_the_newest_is_compared(folder, capsys):
    assert inspect(capsys, folder, folder / "step-00000004")[0] == 0
    assert inspect(capsys, folder / "step-00000002", folder)[0] == 1


def test_other_shapes_and_names_are_said(folder, capsys, tmp_path):
    wide = Trainer(nn.Linear(3, 2, bias=False), optim.SGD(0.1), "mse")
    wide.save(tmp_path / "wide")
    code, text = inspect(capsys, folder / "step-00000002", tmp_path / "wide")
    assert code == 1
    assert "model: weight float32 (1, 3) and float32 (2, 3)" in text
    assert "model: bias only in step-00000002" in text


@pytest.mark.parametrize("arguments", [["no"], ["step-00000002", "no"], ["empty"]])
def test_what_is_no_checkpoint_is_one_line_and_exit_code_1(folder, capsys, arguments):
    (folder / "empty").mkdir()
    code, text = inspect(capsys, *(folder / name for name in arguments))
    assert code == 1
    assert re.search(rf"^mlx-fit inspect: \S*{arguments[-1]} (is no folder|holds no)", text)
