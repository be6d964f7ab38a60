"""What ``mlx-fit finetune`` can be told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_fit.cli.mlx_lm_config import read_mlx_lm
from mlx_fit.cli.preferences import SETTINGS as OBJECTIVE_SETTINGS
from mlx_fit.cli.preferences import check_objective
from mlx_fit.cli.settings import Setting, read_toml, resolve
from mlx_fit.errors import ConfigurationError

LORA_ONLY = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_layers", "dora", "rslora"),
)
METHODS = ("full", "last_layers")

MODEL_SETTINGS = (
    Setting("model", str, None, "folder of a model in mlx-lm's layout (or a name on the hub)"),
    Setting("quantize", int, None, "quantize the model to so many bits first (QLoRA)", least=2),
    Setting("quantize_group_size", int, 64, "weights that share a scale", least=16),
    Setting("trust_remote_code", bool, False, "let the model's folder run code of its own"),
)

TEXT_SETTINGS = (
    Setting("data", str, None, "folder with train.jsonl, valid.jsonl, test.jsonl; or one file"),
    Setting(
        "format",
        str,
        "auto",
        "of the rows",
        choices=("auto", "alpaca", "sharegpt", "chat", "completions", "text"),
    ),
    Setting(
        "train_on",
        str,
        "completions",
        "targets: every answer, the last one, or every token",
        choices=("completions", "last", "all"),
    ),
    Setting("use_chat_template", bool, False, "make chats of Alpaca and completion rows"),
    Setting("max_length", int, 2048, "tokens of a row at most", least=2),
    Setting(
        "truncation",
        str,
        "truncate",
        "what happens to longer rows",
        choices=("truncate", "drop", "error"),
    ),
    Setting("on_error", str, "raise", "what a bad row does", choices=("raise", "skip")),
    Setting("batch_size", int, 4, "rows of a batch", least=1),
    Setting("max_shapes", int, 16, "shapes of batches at most", least=1),
)

SETTINGS = (
    *MODEL_SETTINGS,
    *TEXT_SETTINGS,
    Setting("validation_split", float, 0.1, "share of one file's rows, the last ones", least=0.0),
    Setting("pack", int, None, "pack whole documents into rows of so many tokens", least=2),
    Setting("lora_rank", int, 8, "rank of the adapters", least=1),
    Setting("lora_alpha", float, 16.0, "adapters are scaled by alpha / rank", above=0.0),
    Setting("lora_dropout", float, 0.0, "dropout of the adapters' inputs", least=0.0, below=1.0),
    Setting("lora_targets", list, None, "layers to adapt, ends of names (default: all linear)"),
    Setting("lora_layers", int, None, "adapt the last so many blocks only", least=1),
    Setting("dora", bool, False, "learn magnitudes as well (DoRA)"),
    Setting("rslora", bool, False, "scale by alpha / sqrt(rank)"),
    Setting("last_layers", int, None, "no adapters: train the last so many blocks; -1: all"),
    Setting("head", bool, None, "with --last-layers: train the output projection (default: where "
            "there is one of its own)"),
    Setting("full", bool, False, "no adapters: train every parameter"),
    Setting("start_from", str, None, "begin with the adapters of this folder or .safetensors file"),
    Setting(
        "optimizer",
        str,
        "adamw",
        "of MLX",
        choices=("adamw", "adam", "sgd", "adafactor", "lion", "muon"),
    ),
    Setting("optimizer_config", dict, None, "further arguments of the optimizer"),
    Setting("learning_rate", float, 1e-4, "its highest value", least=0.0),
    Setting("weight_decay", float, None, "of the optimizer, if it has any", least=0.0),
    Setting("float32", bool, False, "train in float32, whatever the model's own precision"),
    Setting("schedule", str, "cosine", "of the rate", choices=("constant", "cosine", "linear")),
    Setting("warmup_steps", int, 0, "updates in which the rate rises", least=0),
    Setting("lr_schedule", dict, None, "mlx-lm's: name, arguments, warmup, warmup_init"),
    Setting("max_steps", int, 1000, "updates of the run", least=1),
    Setting("epochs", int, None, "passes over the data, instead of --max-steps", least=1),
    Setting("gradient_accumulation", int, 1, "batches to an update", least=1),
    Setting("clip_norm", float, None, "largest norm of the gradient", above=0.0),
    *OBJECTIVE_SETTINGS,
    Setting("label_smoothing", float, 0.0, "share of a target that is spread", least=0.0,
            below=1.0),
    Setting("z_loss", float, 0.0, "factor of logsumexp squared", least=0.0),
    Setting("chunk_size", int, None, "tokens whose logits are in memory; 0: all; default: 128 if "
            "the model's head can be told from its body", least=0),
    Setting("router_loss_weight", float, 0.0, "factor of the load-balancing loss of a mixture of "
            "experts (0.01 in the paper)", least=0.0),
    Setting("neftune", float, None, "noise on embeddings (5 in the paper)", above=0.0),
    Setting("checkpoint_layers", bool, False, "recompute blocks to save memory"),
    Setting("eval_every", int, 200, "updates between evaluations", least=1),
    Setting("eval_batches", int, None, "batches of an evaluation at most", least=1),
    Setting("patience", int, None, "stop after so many evaluations without improvement", least=0),
    Setting("test", bool, False, "evaluate the best adapters on test.jsonl afterwards"),
    Setting("test_batches", int, None, "batches of that at most", least=1),
    Setting("adapter_path", str, "adapters", "folder for the best adapters"),
    Setting("adapter_format", str, "mlx-lm", "of their files", choices=("mlx-lm", "peft")),
    Setting("checkpoint_dir", str, None, "default: checkpoints in the adapters' folder"),
    Setting("checkpoint_every", int, 100, "updates between checkpoints", least=1),
    Setting("keep_checkpoints", int, 2, "how many stay", least=1),
    Setting("resume", bool, False, "go on from the newest checkpoint, if there is one"),
    Setting("plan", bool, True, "measure and print what memory a step takes"),
    Setting("log_every", int, 10, "updates between rows of log.jsonl", least=1),
    Setting("seed", int, 0, "of everything random", least=0),
)  # fmt: skip


def read_settings(arguments: argparse.Namespace) -> argparse.Namespace:
    """The settings of ``mlx-fit finetune``: flags, then the file, then defaults.

    Raises:
        ConfigurationError: something is misspelt, missing, of another kind, or contradicts.
    """
    file: dict[str, Any] = {}
    name = ""
    if arguments.config is not None:
        name = str(arguments.config)
        file = _read(arguments.config)
    settings, given = resolve(arguments, SETTINGS, file, name)
    for required in ("model", "data"):
        if getattr(settings, required) is None:
            raise ConfigurationError(f"--{required} is missing.")
    _choose_method(settings, given, {key for key in given if key in vars(arguments)})
    check_objective(settings)
    if settings.router_loss_weight and settings.checkpoint_layers:
        raise ConfigurationError(
            "--router-loss-weight and --checkpoint-layers exclude each other: what a router says "
            "inside a recomputed block cannot be looked at from outside."
        )
    if settings.lr_schedule is not None and given & {"schedule", "warmup_steps"}:
        raise ConfigurationError("lr_schedule and schedule or warmup_steps: give one of them.")
    if settings.epochs is not None and "max_steps" not in given:
        settings.max_steps = None
    if not settings.learning_rate > 0:
        raise ConfigurationError(f"--learning-rate is {settings.learning_rate}; expected above 0.")
    if not settings.validation_split < 1:
        raise ConfigurationError("--validation-split expects a share below 1.")
    return settings


def _choose_method(settings: argparse.Namespace, given: set[str], flags: set[str]) -> None:
    """One way of training; flags decide over the file, and within each nothing may contradict."""
    for source in (flags, given - flags):
        methods = [key for key in METHODS if key in source and getattr(settings, key)]
        adapters = [key for key in LORA_ONLY if key in source and getattr(settings, key)]
        if len(methods) == 2:
            raise ConfigurationError("--full and --last-layers exclude each other: give one.")
        if methods and adapters:
            raise ConfigurationError(
                f"{_flag(adapters[0])} is for adapters, and {_flag(methods[0])} trains without any."
            )
        if methods or adapters:
            for key in METHODS:
                if key not in methods:
                    setattr(settings, key, False if key == "full" else None)
            for key in LORA_ONLY if methods else ():
                setattr(settings, key, None)
            break
    has_adapters = not settings.full and settings.last_layers is None
    if settings.adapter_format == "peft" and not has_adapters:
        raise ConfigurationError("--adapter-format peft is for adapters, and there are none.")
    if settings.head is not None and settings.last_layers is None:
        raise ConfigurationError("--head goes with --last-layers.")
    if settings.last_layers == 0:
        raise ConfigurationError("--last-layers 0 trains nothing; expected at least 1, or -1.")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        return read_toml(path)
    if path.suffix in (".yaml", ".yml"):
        return read_mlx_lm(path)
    raise ConfigurationError(
        f"--config {path}: expected a .toml file, or mlx-lm's configuration as .yaml."
    )
