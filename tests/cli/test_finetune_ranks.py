"""``mlx-fit launch -n 2 -- ... finetune``: two real processes give what one gives."""

from __future__ import annotations

import json
import subprocess

import mlx.core as mx
import numpy as np
from model_folders import command, data_folder, environment, llama_folder

from mlx_fit.cli import main

LIMIT_SECONDS = 120  # two busy cores; it takes about 10


def test_two_ranks_tune_as_one_process_does(tmp_path):
    llama_folder(tmp_path / "model")
    data_folder(tmp_path / "data")
    options = ("finetune", "--model", tmp_path / "model", "--data", tmp_path / "data",
               "--max-steps", 8, "--eval-every", 4, "--learning-rate", 0.01, "--no-plan",
               "--optimizer", "sgd")  # fmt: skip
    alone = [*map(str, options), "--adapter-path", str(tmp_path / "alone")]
    assert main(alone) == 0
    words = command(*options, "--adapter-path", tmp_path / "two")
    done = subprocess.run(
        [*command("launch", "-n", 2, "--"), *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Best val_loss") == 1
    first, second = (mx.load(str(tmp_path / r / "adapters.safetensors")) for r in ("alone", "two"))
    for name, array in first.items():
        np.testing.assert_allclose(second[name], array, atol=1e-5, err_msg=name)
    rows = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1])
            for run in ("alone", "two")]  # fmt: skip
    np.testing.assert_allclose(rows[0]["loss"], rows[1]["loss"], rtol=1e-5)
