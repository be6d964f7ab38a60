"""The whole way on the command line, in real processes: train, kill, go on, evaluate, fuse, use."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.trainer import default_loss
from model_folders import command, data_folder, environment, llama_folder, run_process

from mlx_fit.text import TextDataset

OPTIONS = (
    *("--max-steps", 40, "--eval-every", 20, "--checkpoint-every", 5, "--learning-rate", 0.02),
    *("--lora-dropout", 0.1, "--lora-rank", 4, "--no-plan"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, data, and adapters from a run that nobody disturbed."""
    root = tmp_path_factory.mktemp("finetune")
    llama_folder(root / "model")
    data_folder(root / "data")
    done = run_process(*arguments(root, "whole"), "--test")
    assert done.returncode == 0, done.stderr
    (root / "whole" / "printed").write_text(done.stdout)
    return root


def arguments(root, adapters):
    paths = ("--model", root / "model", "--data", root / "data", "--adapter-path", root / adapters)
    return "finetune", *paths, *OPTIONS


def test_statistics_and_the_report_are_printed_first(place):
    printed = (place / "whole" / "printed").read_text()
    first = printed.index("trainable share")
    assert first < printed.index("24 of 24 rows") < printed.index("24 rows in 6 batches")
    assert printed.index("24 rows in 6 batches") < printed.index("Best val_loss")


def test_a_run_that_was_killed_ends_with_the_same_bits(place):
    command_line = command(*arguments(place, "killed"))
    process = subprocess.Popen(command_line, env=environment(), stdout=subprocess.DEVNULL)
    folder = place / "killed" / "checkpoints"
    end = time.monotonic() + 120
    while not (folder.is_dir() and any(p.name >= "step-00000010" for p in folder.glob("step-*"))):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = run_process(*arguments(place, "killed"), "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (place / "killed" / name).read_bytes() == (place / "whole" / name).read_bytes()
    last = [json.loads((place / run / "log.jsonl").read_text().splitlines()[-1])
            for run in ("killed", "whole")]  # fmt: skip
    assert last[0]["loss"] == last[1]["loss"]


def test_evaluate_agrees_with_mlx_lms_own_loss(place):
    done = run_process(
        *("evaluate", "--model", place / "model", "--adapter-path", place / "whole"),
        *("--data", place / "data", "--json"),
    )
    found = json.loads(done.stdout)
    model, tokenizer = mlx_lm.load(str(place / "model"), adapter_path=str(place / "whole"))
    total = count = 0
    for tokens, mask in TextDataset(place / "data" / "test.jsonl", tokenizer):
        span = mx.array([[int(np.argmax(mask)), len(tokens)]])
        # mlx-lm counts one target behind the last token, so it gets a pad token that is left out.
        loss, targets = default_loss(model, mx.array(tokens)[None], span - mx.array([[0, 1]]))
        total, count = total + (loss * targets).item(), count + targets.item()
    assert found["num_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    printed = (place / "whole" / "printed").read_text()
    assert f"test: loss {found['loss']:.4f}" in printed


def test_fused_or_with_adapters_mlx_lm_generates_the_same(place):
    done = run_process(
        *("fuse", "--model", place / "model", "--adapter-path", place / "whole"),
        *("--save-path", place / "fused"),
    )
    assert done.returncode == 0, done.stderr
    prompt = "what is the next word after red ?"
    model, tokenizer = mlx_lm.load(str(place / "fused"))
    mx.random.seed(3)
    sampler = make_sampler(1.0)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6, sampler=sampler)
    assert expected.strip()
    done = run_process(
        *("generate", "--model", place / "model", "--adapter-path", place / "whole"),
        *("--prompt", prompt, "--max-tokens", 6, "--no-chat-template"),
        *("--temperature", 1.0, "--seed", 3),
    )
    assert done.stdout.rstrip("\n") == expected


def test_sigterm_writes_a_checkpoint_and_ends_with_143(place):
    options = (*arguments(place, "preempted"), "--max-steps", 100000)
    process = subprocess.Popen(
        command(*options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    folder = place / "preempted" / "checkpoints"
    while not (folder.is_dir() and any(folder.glob("step-*"))):
        assert process.poll() is None
        time.sleep(0.001)
    process.terminate()
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143
    assert error.count("\n") == 1
