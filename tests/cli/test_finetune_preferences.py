"""``mlx-fit finetune --objective dpo|orpo`` and the routers' loss, on tiny models."""

from __future__ import annotations

import json
import re
from functools import partial

import mlx.core as mx
import mlx_lm
import model_folders
import numpy as np
import pytest
from llama import logits
from model_folders import WORDS, data_folder, llama_folder, mixtral_folder, rows, write_rows

from mlx_fit import DPO
from mlx_fit.cli import main
from mlx_fit.text import PreferenceBatches, PreferenceDataset


def pairs(count, start=0):
    found = []
    for row, index in zip(rows(count, start), range(start, start + count), strict=True):
        rejected = f" {WORDS[(index + 5) % 10]}"
        found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("preferences")
    llama_folder(root / "model")
    mixtral_folder(root / "moe")
    data_folder(root / "text")
    for name, count, start in (("train", 16, 0), ("valid", 6, 3), ("test", 5, 7)):
        write_rows(root / "data" / f"{name}.jsonl", pairs(count, start))
    write_rows(root / "one.jsonl", pairs(12))
    return root


tune = partial(model_folders.tune, steps=4)


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective", "dpo"),
        ("--objective", "dpo", "--label-smoothing", 0.1, "--dora"),
        ("--objective", "dpo", "--full"),
        ("--objective", "dpo", "--last-layers", 1, "--gradient-accumulation", 2),
        ("--objective", "orpo", "--beta", 0.5),
        ("--objective", "orpo", "--last-layers", 1, "--checkpoint-layers"),
    ],
)
def test_mlx_lm_loads_what_preferences_gave(flags, place, tmp_path, capsys):
    assert tune(place, tmp_path, *flags, "--test") == 0
    printed = capsys.readouterr().out
    assert "16 of 16 pairs" in printed
    assert re.search(r"test: loss [\d.]+, rewards/margins", printed)
    base, _ = mlx_lm.load(str(place / "model"))
    tuned, _ = mlx_lm.load(str(place / "model"), adapter_path=str(tmp_path))
    assert np.abs(logits(tuned) - logits(base)).max() > 1e-4


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", [("--lora-rank", 4), ("--full",)])
def test_dpo_begins_at_log_two_and_learns_the_pairs(way, place, tmp_path):
    flags = ("--objective", "dpo", "--schedule", "constant", "--optimizer", "adam", *way)
    still = ("--learning-rate", 1e-30)
    assert tune(place, tmp_path / "still", *flags, *still) == 0
    assert log_of(tmp_path / "still")[-1]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert tune(place, tmp_path / "a", *flags, "--learning-rate", 0.003, steps=20) == 0
    first, *_, last = [row for row in log_of(tmp_path / "a") if row["event"] == "epoch"]
    assert last["loss"] < first["loss"] < np.log(2)
    assert last["rewards/margins"] > first["rewards/margins"]


def test_the_reference_of_a_full_run_is_the_model_as_it_was(place, tmp_path, capsys):
    """The loss after training, against DPO with the original model as a second one."""
    flags = ("--objective", "dpo", "--full", "--beta", 0.3, "--test")
    assert tune(place, tmp_path, *flags) == 0
    printed = float(re.search(r"test: loss ([\d.]+)", capsys.readouterr().out)[1])
    base, tokenizer = mlx_lm.load(str(place / "model"))
    tuned, _ = mlx_lm.load(str(place / "model"), adapter_path=str(tmp_path))
    dataset = PreferenceDataset(place / "data" / "test.jsonl", tokenizer)
    [batch] = PreferenceBatches(dataset, 5, max_shapes=2)
    arrays = batch._replace(**{name: mx.array(part) for name, part in batch._asdict().items()})
    expected = DPO(0.3, reference=base)(tuned, arrays).mean.item()
    assert printed == pytest.approx(expected, abs=2e-4)


def test_one_file_of_pairs_is_split(place, tmp_path, capsys):
    flags = ("--objective", "orpo", "--validation-split", 0.25)
    assert tune(place, tmp_path, *flags, data="one.jsonl") == 0
    printed = capsys.readouterr().out
    assert "9 rows in 3 batches" in printed
    assert "ORPO, beta 0.1" in printed
    assert "3 rows for validation" in printed


def test_a_dry_run_shows_both_answers(place, tmp_path, capsys):
    assert tune(place, tmp_path / "a", "--objective", "dpo", "--dry-run", "--plan") == 0
    printed = capsys.readouterr().out
    shown = re.findall(r"(\d)\. (chosen|rejected): what is .*>>(\w+).*</s><<", printed)
    assert [(number, kind) for number, kind, _ in shown] == [
        ("1", "chosen"), ("1", "rejected"), ("2", "chosen"), ("2", "rejected")
    ]  # fmt: skip
    assert "Memory of a training step, batch of 4" in printed
    assert not (tmp_path / "a").exists()


def test_settings_may_stand_in_a_file(place, tmp_path):
    flags = ("--objective", "dpo", "--beta", 0.2)
    assert tune(place, tmp_path / "a", *flags) == 0
    record = tmp_path / "a" / "finetune.toml"
    assert 'objective = "dpo"' in record.read_text()
    assert main(["finetune", "--config", str(record), "--adapter-path", str(tmp_path / "b")]) == 0
    first, second = (tmp_path / run / "adapters.safetensors" for run in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("data", "flags", "code", "message"),
    [
        ("data", (), 1, "they are preferences: mlx-fit finetune --objective dpo"),
        ("text", ("--objective", "dpo"), 1, "its rows have prompt, completion; --objective dpo"),
        ("text", ("--beta", 0.1), 2, "--beta goes with --objective dpo or orpo"),
        ("data", ("--objective", "dpo", "--pack", 64), 2, "--pack has no meaning"),
        ("data", ("--objective", "dpo", "--z-loss", 0.1), 2, "--z-loss has no meaning"),
        ("data", ("--objective", "orpo", "--label-smoothing", 0.1), 2, "not for --objective orpo"),
        ("data", ("--objective", "dpo", "--beta", 0), 2, "--beta 0: dpo would ignore"),
        (
            "data",
            ("--objective", "dpo", "--label-smoothing", 0.5),
            2,
            "--label-smoothing 0.5: from",
        ),
        ("data", ("--objective", "dop"), 2, "dpo"),
        ("text", ("--router-loss-weight", 0.1), 1, "needs a mixture of experts"),
        ("text", ("--router-loss-weight", 0.1, "--checkpoint-layers"), 2, "exclude each other"),
    ],
)
def test_what_does_not_fit_is_said(data, flags, code, message, place, tmp_path, capsys):
    try:
        found = tune(place, tmp_path, *flags, data=data)
    except SystemExit as error:  # argparse's own
        found = error.code
    assert found == code
    assert message in capsys.readouterr().err


def evaluate(place, *flags, data="data"):
    """Run ``mlx-fit evaluate``; its exit status."""
    paths = ("--model", place / "model", "--data", place / data)
    return main(["evaluate", *map(str, (*paths, *flags))])


VALUES = re.compile(r"loss ([\d.-]+), rewards/margins ([\d.-]+), rewards/accuracies ([\d.]+)")


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective", "dpo", "--beta", 0.3, "--label-smoothing", 0.1),
        ("--objective", "dpo", "--full"),
        ("--objective", "dpo", "--quantize", 8, "--quantize-group-size", 32),
        ("--objective", "orpo", "--beta", 0.5),
        ("--objective", "orpo", "--last-layers", 1),
    ],
)
def test_evaluate_gives_what_the_run_printed(flags, place, tmp_path, capsys):
    """By the record of the run: its objective, beta and smoothing need not be said again."""
    assert tune(place, tmp_path, *flags, "--test") == 0
    expected = VALUES.search(capsys.readouterr().out).groups()
    same = [flag for flag in flags if str(flag).startswith("--quantize")] and flags[2:]
    assert evaluate(place, "--adapter-path", tmp_path, *same) == 0
    printed = capsys.readouterr().out
    assert VALUES.search(printed).groups() == expected
    assert "test.jsonl: " in printed
    assert "of 5 rows" in printed
    less = ("--batches", 1, "--batch-size", 2)
    assert evaluate(place, "--adapter-path", tmp_path, *less, *same) == 0
    assert "of 1 of 3 batches" in capsys.readouterr().out
    assert evaluate(place, "--adapter-path", tmp_path, "--json", "--chunk-size", 3, *same) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found] == ["loss", "rewards/margins", "rewards/accuracies"]
    assert [*found.values()] == pytest.approx([float(v) for v in expected], abs=1e-4)


@pytest.mark.parametrize("way", [("--full",), ("--last-layers", 1)])
def test_what_a_run_started_from_is_its_reference(way, place, tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    assert tune(place, first, "--objective", "orpo", *way) == 0
    start = ("--start-from", first / "adapters.safetensors")
    assert tune(place, second, "--objective", "dpo", *way, *start, "--test") == 0
    expected = VALUES.search(capsys.readouterr().out).groups()
    assert evaluate(place, "--adapter-path", second) == 0
    assert VALUES.search(capsys.readouterr().out).groups() == expected
    assert evaluate(place, "--adapter-path", second, "--reference", place / "model") == 0
    assert VALUES.search(capsys.readouterr().out).groups() != expected
    first.rename(tmp_path / "elsewhere")
    assert evaluate(place, "--adapter-path", second) == 1
    assert "compared with what it began with" in capsys.readouterr().err


def test_a_fused_model_is_compared_with_a_reference(place, tmp_path, capsys):
    adapters, fused = ("--adapter-path", str(tmp_path / "a")), str(tmp_path / "fused")
    assert tune(place, tmp_path / "a", "--objective", "dpo", "--beta", 0.2) == 0
    capsys.readouterr()
    assert evaluate(place, *adapters) == 0
    expected = VALUES.search(capsys.readouterr().out).groups()
    assert main(["fuse", "--model", str(place / "model"), *adapters, "--save-path", fused]) == 0
    pair = ("--objective", "dpo", "--beta", 0.2, "--reference", place / "model")
    paths = ("--model", fused, "--data", place / "data")
    assert main(["evaluate", *map(str, (*paths, *pair))]) == 0
    found = VALUES.search(capsys.readouterr().out).groups()
    assert [*map(float, found)] == pytest.approx([*map(float, expected)], abs=2e-4)


def test_adapters_of_pairs_are_evaluated_on_text_as_well(place, tmp_path, capsys):
    assert tune(place, tmp_path, "--objective", "orpo") == 0
    assert evaluate(place, "--adapter-path", tmp_path, data="text") == 0
    assert "perplexity" in capsys.readouterr().out


AGAINST = ("--objective", "dpo", "--reference", "none")


@pytest.mark.parametrize(
    ("data", "flags", "code", "message"),
    [
        ("data", (), 1, "they are preferences. Say --objective dpo or orpo"),
        ("data", ("--objective", "dpo"), 2, "compares with a reference: give --adapter-path"),
        ("data", (*AGAINST, "--beta", 0), 2, "--beta 0: dpo would ignore"),
        ("data", (*AGAINST, "--label-smoothing", 0.7), 2, "--label-smoothing 0.7: from a half"),
        ("data", ("--objective", "orpo", "--reference", "x"), 2, "--reference is not for"),
        ("data", AGAINST, 1, "--reference none: there is no"),
        ("data", ("--objective", "orpo", "--train-on", "all"), 2, "--train-on has no meaning"),
        ("text", ("--objective", "orpo"), 1, "its rows have prompt, completion"),
        ("text", ("--beta", 0.1), 2, "--beta goes with --objective dpo or orpo"),
        ("nowhere", (), 1, "there is no such file or folder"),
    ],
)
def test_evaluate_says_what_does_not_fit(data, flags, code, message, place, capsys):
    assert evaluate(place, *flags, data=data) == code
    assert message in capsys.readouterr().err


def test_chunks_give_what_whole_logits_give(place, tmp_path):
    rows = []
    for name, size in (("whole", 0), ("chunks", 5)):
        flags = ("--objective", "dpo", "--chunk-size", size, "--optimizer", "sgd")
        assert tune(place, tmp_path / name, *flags) == 0
        rows.append(log_of(tmp_path / name)[-1])
    keys = [key for key in rows[0] if key.startswith(("loss", "val_", "rewards", "logps"))]
    assert [rows[1][k] for k in keys] == pytest.approx(
        [rows[0][k] for k in keys], rel=1e-3, abs=1e-5
    )


def test_routers_are_balanced_by_flag_and_by_file(place, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("router-loss-weight = 0.05\n")
    for name, flags in (("a", ("--router-loss-weight", 0.05)), ("b", ("--config", config))):
        assert tune(place, tmp_path / name, *flags, model="moe", data="text") == 0
    first, second = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert 0.05 < first[-1]["aux_loss"] < 0.2  # 0.1 where two of four experts are equally busy
    assert first[-1]["aux_loss"] == second[-1]["aux_loss"]
