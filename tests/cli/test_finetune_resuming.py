"""A run of ``mlx-fit finetune`` that is stopped and goes on ends with the same bits."""

from __future__ import annotations

import json
import signal

import mlx.core as mx
import pytest
from model_folders import WORDS, data_folder, llama_folder, mixtral_folder, rows, write_rows

from mlx_fit.cli import main
from mlx_fit.cli.best_adapters import BestAdapters

STEPS = 11
DROPPING = ("--lora-dropout", 0.2)
WAYS = {
    "buckets": ("text", *DROPPING),
    "packed": ("text", "--pack", 40, *DROPPING),
    "dora": ("text", "--dora", *DROPPING),
    "qlora": ("text", "--quantize", 4, "--quantize-group-size", 32, *DROPPING),
    "full, chunked, noisy": ("text", "--full", "--chunk-size", 8, "--neftune", 5),
    "dpo": ("pairs", "--objective", "dpo", *DROPPING),
    "dpo, full, accumulated": ("pairs", "--objective", "dpo", "--full",
                               "--gradient-accumulation", 2),
    "orpo": ("pairs", "--objective", "orpo", *DROPPING),
    "experts": ("text", "--router-loss-weight", 0.1, *DROPPING),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resuming")
    llama_folder(root / "model")
    mixtral_folder(root / "moe")
    data_folder(root / "text")
    for name, count, start in (("train", 24, 0), ("valid", 6, 3)):
        pairs = [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": f" {WORDS[i % 7]}"}
            for i, r in enumerate(rows(count, start))
        ]
        write_rows(root / "pairs" / f"{name}.jsonl", pairs)
    return root


def tune(place, adapters, way, *more):
    data, *flags = WAYS[way]
    model = "moe" if way == "experts" else "model"
    paths = ("--model", place / model, "--data", place / data, "--adapter-path", adapters)
    options = ("--max-steps", STEPS, "--eval-every", 4, "--learning-rate", 0.01, "--no-plan")
    return main(["finetune", *map(str, (*paths, *options, *flags, *more))])


def state_of(folder):
    """Everything that the newest checkpoint holds of the weights, the optimizer and the logs."""
    newest = max((folder / "checkpoints").glob("step-*"))
    arrays = {}
    for name in ("model", "optimizer"):
        for key, array in mx.load(str(newest / f"{name}.safetensors")).items():
            arrays[f"{name}.{key}"] = array.tolist()
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return newest.name, arrays, last


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_ends_with_the_same_bits(way, place, tmp_path, monkeypatch):
    assert tune(place, tmp_path / "whole", way) == 0
    judge = BestAdapters.on_validation_end

    def stop_after(self, logs):
        judge(self, logs)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(BestAdapters, "on_validation_end", stop_after)
        assert tune(place, tmp_path / "stopped", way) == 143
    assert state_of(tmp_path / "stopped")[0] == "step-00000004"
    mx.random.seed(999)  # a fresh process has another key
    assert tune(place, tmp_path / "stopped", way, "--resume") == 0
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")
    first, second = (tmp_path / name / "adapters.safetensors" for name in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()
