"""``mlx-fit train`` in real processes: ended by a signal, gone on with, on two ranks."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from model_folders import command, environment, run_process

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANGES = (
    *("--set", "fit.epochs=4", "--set", "callbacks.EarlyStopping=false"),
    *("--set", "fit.checkpoint_every=epoch"),
)


def arguments(root, name):
    """The command of a run whose files go to a folder."""
    folder = root / name
    paths = {
        "fit.checkpoint_dir": folder / "checkpoints",
        "callbacks.ModelCheckpoint.filepath": folder / "best.safetensors",
        "callbacks.CSVLogger.filename": folder / "history.csv",
        "callbacks.JSONLogger.path": folder / "log.jsonl",
    }
    pairs = [word for key, path in paths.items() for word in ("--set", f"{key}={path}")]
    return ["train", str(EXAMPLES / "digits.toml"), *CHANGES, *pairs]


def losses(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["event"] == "epoch"]


def test_a_run_that_sigterm_ends_is_143_and_goes_on_to_the_same_values(tmp_path):
    whole = run_process(*arguments(tmp_path, "whole"))
    assert whole.returncode == 0, whole.stderr
    cut = command(*arguments(tmp_path, "cut"), "--set", "fit.epochs=4000")
    process = subprocess.Popen(cut, env=environment(), stdout=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    end = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    done = len(losses(tmp_path / "cut"))
    again = run_process(*arguments(tmp_path, "cut"), "--set", f"fit.epochs={max(4, done)}")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "cut")[:4] == losses(tmp_path / "whole")


def test_two_ranks_train_together_and_one_of_them_prints(tmp_path):
    shutil.copy(EXAMPLES / "digits_net.py", tmp_path)
    text = (EXAMPLES / "digits.toml").read_text().replace("hidden = 128", "dropout = 0.0")
    (tmp_path / "digits.toml").write_text(text)
    found = {}
    for name, launcher in {"one": (), "two": ("launch", "-n", 2, "--")}.items():
        words = arguments(tmp_path, name)
        words[1] = tmp_path / "digits.toml"
        own = [sys.executable, "-m", "mlx_fit.cli", *words] if launcher else words
        done = run_process(*launcher, *own)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trained") == 1
        found[name] = losses(tmp_path / name)
    assert all(abs(a - b) < 1e-4 for a, b in zip(found["one"], found["two"], strict=True))
