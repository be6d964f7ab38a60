"""``mlx-fit finetune``, ``evaluate`` and ``fuse`` on tiny models, in this process."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from llama import logits
from model_folders import data_folder, llama_folder, mixtral_folder, rows, tune, write_rows

from mlx_fit.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    llama_folder(root / "model")
    mixtral_folder(root / "moe")
    data_folder(root / "data")
    write_rows(root / "one.jsonl", rows(20))
    return root


def test_a_dry_run_shows_the_targets_and_trains_nothing(place, tmp_path, capsys):
    assert tune(place, tmp_path / "a", "--dry-run") == 0
    printed = capsys.readouterr().out
    shown = re.findall(r"\d\. what is the next word after (\w+) \?(.*)>>(\w+).*</s><<", printed)
    assert len(shown) == 4
    expected = {row["prompt"].split()[6]: row["completion"].split()[0] for row in rows(10)}
    assert all(expected[word] == answer for word, _, answer in shown)
    assert "Memory of a training step" not in printed
    assert not (tmp_path / "a").exists()


def test_a_dry_run_in_colour_marks_targets_by_it(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert tune(place, tmp_path / "a", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "\x1b[1;32m" in printed
    assert ">>" not in printed


def test_the_plan_is_printed_unless_it_is_not_wanted(place, tmp_path, capsys):
    assert tune(place, tmp_path / "a", "--dry-run", "--plan") == 0
    assert "Memory of a training step, batch of 4" in capsys.readouterr().out


WAYS = {
    "last layers": ("--last-layers", 1),
    "full": ("--full",),
    "dora": ("--dora", "--lora-layers", 1),
    "packed": ("--pack", 40),
    "recomputed and noisy": ("--checkpoint-layers", "--neftune", 5),
    "accumulated": ("--gradient-accumulation", 2, "--clip-norm", 1.0),
    "sgd": ("--optimizer", "sgd", "--weight-decay", 0.1, "--schedule", "linear"),
    "chunked": ("--chunk-size", 7),
}


@pytest.mark.parametrize("way", WAYS)
def test_mlx_lm_loads_what_every_way_of_training_gave(way, place, tmp_path):
    assert tune(place, tmp_path, *WAYS[way]) == 0
    base, _ = mlx_lm.load(str(place / "model"))
    tuned, _ = mlx_lm.load(str(place / "model"), adapter_path=str(tmp_path))
    assert np.abs(logits(tuned) - logits(base)).max() > 1e-3


def test_a_mixture_of_experts_is_tuned_and_fused(place, tmp_path):
    assert tune(place, tmp_path / "a", model="moe") == 0
    keys = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_parameters"]
    assert any("switch_mlp" in key for key in keys["keys"])
    arguments = ["--adapter-path", tmp_path / "a", "--save-path", tmp_path / "fused"]
    assert main(["fuse", "--model", str(place / "moe"), *map(str, arguments)]) == 0
    adapted, _ = mlx_lm.load(str(place / "moe"), adapter_path=str(tmp_path / "a"))
    fused, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(fused), logits(adapted), atol=1e-5)


def test_a_quantized_base_is_fused_unpacked_or_refused(place, tmp_path, capsys):
    quantize = ("--quantize", "4", "--quantize-group-size", "32")
    assert tune(place, tmp_path / "a", *quantize) == 0
    fuse = ["fuse", "--model", str(place / "model"), "--adapter-path", str(tmp_path / "a")]
    assert main([*fuse, *quantize, "--save-path", str(tmp_path / "no"), "--requantize"]) == 1
    assert "Fusing would move the outputs" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    losses = []
    for name, more in (("mixed", []), ("dense", ["--dequantize"])):
        assert main([*fuse, *quantize, "--save-path", str(tmp_path / name), *more]) == 0
        capsys.readouterr()
        losses.append(loss_of(place, capsys, "--model", tmp_path / name))
    adapted = loss_of(
        place, capsys, "--model", place / "model", "--adapter-path", tmp_path / "a", *quantize
    )
    assert losses == [pytest.approx(adapted, rel=1e-4)] * 2


def loss_of(place, capsys, *flags):
    assert main(["evaluate", "--data", str(place / "data"), "--json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)["loss"]


def test_nothing_is_overwritten_by_fusing(place, tmp_path, capsys):
    (tmp_path / "kept").write_text("")
    arguments = ["--model", str(place / "model"), "--save-path", str(tmp_path)]
    assert main(["fuse", *arguments]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_second_run_is_refused_where_the_first_has_been(place, tmp_path, capsys):
    assert tune(place, tmp_path) == 0
    record = (tmp_path / "finetune.toml").read_text()
    capsys.readouterr()
    assert tune(place, tmp_path, "--lora-rank", 2) == 1
    assert "--resume goes on with it" in capsys.readouterr().err
    assert (tmp_path / "finetune.toml").read_text() == record


def test_the_record_of_a_run_is_a_configuration(place, tmp_path):
    assert tune(place, tmp_path / "a", "--lora-targets", "q_proj,v_proj") == 0
    record = tmp_path / "a" / "finetune.toml"
    assert main(["finetune", "--config", str(record), "--adapter-path", str(tmp_path / "b")]) == 0
    first, second = (tmp_path / run / "adapters.safetensors" for run in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_last_rows_of_one_file_are_for_validation(place, tmp_path, capsys):
    assert tune(place, tmp_path / "a", "--validation-split", 0.25, data="one.jsonl") == 0
    assert "15 rows in 4 batches" in (printed := capsys.readouterr().out)
    assert "5 rows for validation" in printed
    assert tune(place, tmp_path / "b", "--validation-split", 0, data="one.jsonl") == 0
    assert "No validation data" in (printed := capsys.readouterr().out)
    assert "Kept after 3 updates" in printed
    assert (tmp_path / "b" / "adapters.safetensors").is_file()


def test_the_best_adapters_stay_when_later_ones_are_worse(place, tmp_path, capsys):
    options = ("--eval-every", 1, "--learning-rate", 3.0, "--schedule", "constant")
    assert tune(place, tmp_path, *options, "--optimizer", "sgd", "--patience", 1, steps=30) == 0
    printed = capsys.readouterr().out
    step = int(re.search(r"Best val_loss [\d.]+ after (\d+) updates", printed)[1])
    last = int(re.search(r"(\d+) updates( \(stopped by EarlyStopping\))?\. Best", printed)[1])
    best = float(re.search(r"Best val_loss ([\d.]+)", printed)[1])
    assert step < last < 30
    flags = ("--model", place / "model", "--adapter-path", tmp_path, "--split", "valid")
    assert loss_of(place, capsys, *flags) == pytest.approx(best, abs=1e-4)


def test_an_end_between_evaluations_is_judged_too(place, tmp_path, capsys):
    assert tune(place, tmp_path, "--eval-every", 2, steps=3) == 0
    assert "after 3 updates" in capsys.readouterr().out


def test_training_may_start_from_other_adapters(place, tmp_path, capsys):
    assert tune(place, tmp_path / "a", steps=5) == 0
    begin = ("--start-from", tmp_path / "a", "--learning-rate", 1e-30, "--optimizer", "sgd")
    assert tune(place, tmp_path / "b", *begin, steps=1) == 0
    first, second = (mx.load(str(tmp_path / run / "adapters.safetensors")) for run in "ab")
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert tune(place, tmp_path / "c", "--start-from", tmp_path / "a", "--lora-rank", 2) == 1
    assert "does not fit what trains here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora-targets", "q_prj"), "Did you mean 'q_proj'?"),
        (("--lora-layers", 9), "has 3 blocks"),
        (("--quantize", 4, "--quantize-group-size", 128), "leaves the model as it is"),
        (("--quantize", 7), "MLX has 2, 3, 4, 5, 6, 8 bits"),
        (("--warmup-steps", 5), "must be below the 3 updates"),
        (("--optimizer", "adam", "--weight-decay", 0.1), "cannot be made with"),
        (("--patience", 1, "--validation-split", 0), "needs validation data"),
        (("--test",), "has no test.jsonl"),
        (("--pack", 8), "more than row_length=8"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_line(flags, message, place, tmp_path, capsys):
    assert tune(place, tmp_path, *flags, data="one.jsonl") == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "adapters.safetensors").exists()
