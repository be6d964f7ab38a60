"""Flags, TOML and mlx-lm's YAML: one table of settings, and errors that say what was meant."""

from __future__ import annotations

import argparse

import pytest

from mlx_fit.cli import finetune, main
from mlx_fit.cli.finetune_settings import SETTINGS, read_settings
from mlx_fit.cli.settings import Setting, toml_text
from mlx_fit.errors import ConfigurationError

NEEDED = ("--model", "m", "--data", "d")


def settings(*flags):
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    return read_settings(parser.parse_args([*map(str, flags)]))


def config(folder, text, name="a.toml"):
    (folder / name).write_text(text)
    return folder / name


VALUES = {str: "x", int: 32, float: 0.5, bool: True, list: ["q_proj"], dict: {"beta": 0.5}}

TOGETHER = {"head": {"last_layers": 1}, "beta": {"objective": "dpo"}}


def value_of(setting):
    if setting.name == "last_layers":
        return 2
    return setting.choices[-1] if setting.choices else VALUES[setting.kind]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_can_stand_in_a_toml_file(setting, tmp_path):
    needed = {"model": "m", "data": "d"} | TOGETHER.get(setting.name, {})
    written = needed | {setting.name: value_of(setting)}
    text = toml_text(written)
    dashed = text.replace(f"{setting.name} =", f"{setting.name.replace('_', '-')} =")
    for written in (text, dashed):
        found = settings("--config", config(tmp_path, written))
        assert getattr(found, setting.name) == value_of(setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_but_tables_is_a_flag(setting):
    if setting.kind is dict:
        return
    value = value_of(setting)
    value = ",".join(value) if setting.kind is list else str(value)
    flag = f"--{setting.name.replace('_', '-')}"
    given = [flag] if setting.kind is bool else [flag, value]
    together = TOGETHER.get(setting.name, {}).items()
    extra = [word for key, value in together for word in (f"--{key.replace('_', '-')}", str(value))]
    assert getattr(settings(*NEEDED, *extra, *given), setting.name) == value_of(setting)


def test_flags_win_over_the_file(tmp_path):
    path = config(tmp_path, 'model = "a"\ndata = "b"\nlora_rank = 4\n')
    found = settings("--config", path, "--lora-rank", 16, "--model", "c")
    assert (found.model, found.data, found.lora_rank) == ("c", "b", 16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_rnk = 4", "no setting 'lora_rnk'. Did you mean 'lora_rank'?"),
        ('lora_rank = "4"', "lora_rank is '4'; expected an integer"),
        ("lora_rank = true", "expected an integer"),
        ("lora_rank = 0", "at least 1"),
        ("full = 1", "full is 1; expected true or false"),
        ("lora_targets = [1]", "expected a list of texts"),
        ('optimizer = "adamW"', "expected one of adamw"),
        ("full = true\nlora_rank = 4", "--lora-rank is for adapters"),
        ("full = true\nlast_layers = 4", "exclude each other"),
        ("last_layers = 0", "trains nothing"),
        ("head = true", "--head goes with --last-layers"),
        ("validation_split = 1.0", "a share below 1"),
        ('full = true\nadapter_format = "peft"', "there are none"),
        ("lora_rank", "cannot be read as TOML"),
        ("learning_rate = inf", "learning_rate is inf; expected a finite number"),
        ("neftune = nan", "neftune is nan; expected a finite number"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(line, message, tmp_path):
    path = config(tmp_path, f'model = "m"\ndata = "d"\n{line}\n')
    with pytest.raises(ConfigurationError) as caught:
        settings("--config", path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-stps", "3"], "Did you mean '--max-steps'?"),
        (["--lora-r=3"], "unrecognized"),
        (["--max-steps", "three"], "invalid int value"),
        (["--format", "xml"], "invalid choice"),
        (["--full", "--dora"], "--dora is for adapters"),
        (["--config", "a.json"], "expected a .toml file"),
        (["--batch-size", "0"], "at least 1"),
        (["--lora-dropout", "1"], "--lora-dropout is 1.0; expected a number below 1"),
        (["--label-smoothing", "1"], "--label-smoothing is 1.0; expected a number below 1"),
        (["--lora-alpha", "-1"], "--lora-alpha is -1.0; expected a number above 0"),
        (["--neftune", "0"], "--neftune is 0.0; expected a number above 0"),
        (["--clip-norm", "0"], "--clip-norm is 0.0; expected a number above 0"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(flags, message, capsys):
    try:
        code = main(["finetune", *NEEDED, *flags])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_missing_model_or_data_is_usage(capsys):
    assert main(["finetune", "--model", "m"]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["evaluate", "--model", "m"]) == 2
    assert main(["generate", "--model", "m"]) == 2
    assert main(["fuse"]) == 2


def test_what_is_not_there_is_a_failed_run_of_one_line(tmp_path, capsys):
    assert main(["finetune", "--model", "m", "--data", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["evaluate", "--model", str(tmp_path / "no"), "--data", str(tmp_path)]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_epochs_stand_instead_of_steps():
    assert settings(*NEEDED, "--epochs", 3).max_steps is None
    assert settings(*NEEDED, "--epochs", 3, "--max-steps", 7).max_steps == 7


def test_a_method_of_the_command_line_wins_over_that_of_the_file(tmp_path):
    path = config(tmp_path, 'model = "m"\ndata = "d"\nlora_rank = 4\nlora_dropout = 0.1\n')
    found = settings("--config", path, "--full")
    assert found.full
    assert found.lora_rank is None
    path = config(tmp_path, 'model = "m"\ndata = "d"\nlast_layers = 4\n')
    found = settings("--config", path, "--lora-rank", 2)
    assert found.last_layers is None
    assert found.lora_rank == 2


def test_a_written_file_reads_back_as_it_was(tmp_path):
    text = 'a "quoted"\\path\nwith é'
    values = {"model": text, "data": "d", "lora_targets": ["q", "v"], "optimizer_config": {"b": 1}}
    found = settings("--config", config(tmp_path, toml_text(values)))
    assert {key: getattr(found, key) for key in values} == values


# --- mlx-lm's YAML --------------------------------------------------------------------------------

YAML = """
model: "mlx_model"
train: true
fine_tune_type: dora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
  sgd: {}
data: "rows"
seed: 3
num_layers: 8
batch_size: 2
iters: 100
val_batches: -1
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 50
resume_adapter_file: null
adapter_path: "out"
save_every: 20
test: true
test_batches: 7
max_seq_length: 512
grad_checkpoint: true
grad_accumulation_steps: 4
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 10.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 5
  warmup_init: 1e-7
  arguments: [1e-5, 25, 1e-7]
"""


def test_mlx_lms_configuration_is_read_as_it_is(tmp_path):
    found = settings("--config", config(tmp_path, YAML, "lora.yaml"))
    expected = {
        "model": "mlx_model",
        "data": "rows",
        "seed": 3,
        "batch_size": 2,
        "adapter_path": "out",
        "dora": True,
        "lora_rank": 4,
        "lora_alpha": 40.0,
        "lora_dropout": 0.1,
        "lora_targets": ["self_attn.q_proj", "self_attn.v_proj"],
        "lora_layers": 8,
        # mlx-lm counts batches, we count updates of four
        "max_steps": 25,
        "eval_every": 12,
        "checkpoint_every": 5,
        "log_every": 2,
        "gradient_accumulation": 4,
        "eval_batches": None,
        "test": True,
        "test_batches": 7,
        "max_length": 512,
        "checkpoint_layers": True,
        "train_on": "last",
        "use_chat_template": True,
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "optimizer_config": {"betas": [0.9, 0.98], "eps": 1e-6},
        "lr_schedule": {
            "name": "cosine_decay",
            "warmup": 5,
            "warmup_init": 1e-7,
            "arguments": [1e-5, 25, 1e-7],
        },
    }
    assert {key: getattr(found, key) for key in expected} == expected


def test_what_mlx_lms_file_leaves_out_has_mlx_lms_defaults(tmp_path):
    from mlx_lm.lora import CONFIG_DEFAULTS as THEIRS

    found = settings("--config", config(tmp_path, "model: m\ndata: d\ntrain: true\n", "a.yml"))
    assert found.lora_layers == THEIRS["num_layers"]
    assert found.learning_rate == THEIRS["learning_rate"]
    assert found.optimizer == THEIRS["optimizer"]
    assert found.max_steps == THEIRS["iters"]
    assert found.eval_batches == THEIRS["val_batches"]
    assert found.lora_alpha == THEIRS["lora_parameters"]["scale"] * 8
    assert (found.schedule, found.train_on) == ("constant", "all")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_layer: 3", "no key 'num_layer'. Did you mean 'num_layers'?"),
        ("hf_dataset: {path: x}", "hf_dataset is not supported"),
        ("lora_parameters: {rank: 8, alpha: 16}", "no key 'alpha'"),
        ("train: false", "mlx-fit evaluate"),
        ("fine_tune_type: qlora", "expected lora, dora, full"),
        ("iters: many", "iters is 'many'"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_what_mlx_lms_file_cannot_mean_is_told(line, message, tmp_path):
    path = config(tmp_path, f"model: m\ndata: d\n{line}\n", "a.yaml")
    with pytest.raises(ConfigurationError) as caught:
        settings("--config", path)
    assert message in str(caught.value)


def test_a_key_without_counterpart_says_what_happens_instead(tmp_path, capsys):
    settings("--config", config(tmp_path, YAML + "report_to: wandb\n", "a.yaml"))
    assert "report_to does nothing here: logs go to log.jsonl" in capsys.readouterr().err


def test_full_training_of_mlx_lm_leaves_the_head_alone(tmp_path):
    text = "model: m\ndata: d\nfine_tune_type: full\nnum_layers: -1\n"
    found = settings("--config", config(tmp_path, text, "a.yaml"))
    assert (found.last_layers, found.head, found.full) == (-1, False, False)


def test_a_setting_says_its_kind():
    with pytest.raises(ConfigurationError, match=r"x is 1\.5; expected an integer"):
        Setting("x", int, 1, "").checked(1.5, "x")
    assert Setting("x", float, 1.0, "").checked(2, "x") == 2.0
