"""The example program, run as a user runs it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tour_trains_and_leaves_its_files(tmp_path):
    tour = str(ROOT / "examples" / "callbacks_tour.py")
    command = [sys.executable, "-W", "error", tour, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("suggested learning rate: ")
    assert any(line.startswith("data wait ") for line in lines)  # the profiler's table
    assert float(lines[-1].removeprefix("test accuracy: ")) > 0.8
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [row for row in logged if row["event"] == "epoch"]
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in epochs]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "best.safetensors").exists()
    for name in ("train", "validation", "predictions", "hparams"):
        assert list((tmp_path / name).glob("events*"))
