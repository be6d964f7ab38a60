"""Configurations of ``mlx_lm.lora`` (0.32) as settings of ``mlx-fit finetune``."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fit.cli.settings import nearest
from mlx_fit.errors import ConfigurationError

# What mlx-lm does where its file says nothing, which is not what we do.
DEFAULTS: dict[str, Any] = {
    "num_layers": 16,
    "optimizer": "adam",
    "learning_rate": 1e-5,
    "iters": 1000,
    "val_batches": 25,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "save_every": 100,
    "test_batches": 500,
    "batch_size": 4,
    "max_seq_length": 2048,
    "grad_accumulation_steps": 1,
    "adapter_path": "adapters",
    "mask_prompt": False,
    "fine_tune_type": "lora",
    "seed": 0,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
}
SAME = ("model", "data", "batch_size", "adapter_path", "seed", "optimizer", "learning_rate", "test")
OTHER = {
    *("train", "val_batches", "steps_per_report", "steps_per_eval", "save_every", "iters"),
    *("test_batches", "max_seq_length", "grad_accumulation_steps", "mask_prompt", "num_layers"),
    *("fine_tune_type", "lora_parameters", "lr_schedule", "optimizer_config", "grad_checkpoint"),
    *("resume_adapter_file", "trust_remote_code", "clear_cache_threshold", "report_to"),
    *("project_name", "hf_dataset", "config", "prompt_feature", "completion_feature"),
    *("text_feature", "chat_feature"),
}
# Keys without a counterpart -> what happens instead, or None where nothing can.
INSTEAD = {
    "report_to": "logs go to log.jsonl in the adapters' folder and can be sent on from there",
    "project_name": "there is no service that would use it",
    "clear_cache_threshold": "MLX's cache is left alone; DeviceConfig limits it in Python",
    "hf_dataset": None,
    "config": None,
    **dict.fromkeys(("prompt_feature", "completion_feature", "text_feature", "chat_feature")),
}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_mlx_lm(path: Path) -> dict[str, Any]:
    """A YAML configuration of mlx-lm as our settings. Needs PyYAML, which mlx-lm brings.

    mlx-lm counts batches where we count updates: its numbers are divided by
    ``grad_accumulation_steps``.

    Raises:
        ConfigurationError: the file cannot be read, or a key is unknown or has no counterpart.
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigurationError(f"{path} needs PyYAML: pip install 'mlx-fit[lm]'.") from error
    try:
        content = _numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no keys; expected mlx-lm's, such as model: PATH.")
    known = {*SAME, *OTHER}
    for key, value in content.items():
        if key not in known:
            raise ConfigurationError(
                f"{path}: mlx-lm has no key {key!r}.{nearest(str(key), known)}"
            )
        if key in INSTEAD and value:
            if INSTEAD[key] is None:
                raise ConfigurationError(
                    f"{path}: {key} is not supported. Give data as a folder or file of JSONL rows."
                )
            print(f"{path}: {key} does nothing here: {INSTEAD[key]}.", file=sys.stderr)
    if content.get("train") is False:
        raise ConfigurationError(
            f"{path}: train is false. finetune trains; for a test alone use mlx-fit evaluate."
        )
    # An empty value is left to mlx-lm's defaults, as there.
    return _translated(DEFAULTS | {k: v for k, v in content.items() if v is not None}, path)


def _translated(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    window = _count(given, "grad_accumulation_steps", path)
    found = {key: given[key] for key in SAME if key in given}
    found |= {
        "gradient_accumulation": window,
        "max_steps": max(_count(given, "iters", path) // window, 1),
        "eval_every": max(_count(given, "steps_per_eval", path) // window, 1),
        "checkpoint_every": max(_count(given, "save_every", path) // window, 1),
        "log_every": max(_count(given, "steps_per_report", path) // window, 1),
        "max_length": given["max_seq_length"],
        # Completions are chats there; with mask_prompt the last turn alone is learned.
        "train_on": "last" if given["mask_prompt"] else "all",
        "use_chat_template": True,
        "trust_remote_code": given.get("trust_remote_code", False),
    }
    if given.get("grad_checkpoint"):
        found["checkpoint_layers"] = True
    for theirs, ours in (("val_batches", "eval_batches"), ("test_batches", "test_batches")):
        if given[theirs] != -1:
            found[ours] = given[theirs]
    if given.get("lr_schedule"):
        found["lr_schedule"] = given["lr_schedule"]
    else:
        found["schedule"] = "constant"
    # A table by name of optimizer, of which one counts.
    config = given.get("optimizer_config", {})
    if not isinstance(config, dict) or not all(isinstance(v, dict) for v in config.values() if v):
        raise ConfigurationError(f"{path}: optimizer_config expects a table for each optimizer.")
    if own := config.get(str(given["optimizer"]).lower()):
        found["optimizer_config"] = own
    return found | _method(given, path)


def _method(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What trains: adapters, or the last layers."""
    kind, layers = given["fine_tune_type"], given["num_layers"]
    if kind not in ("lora", "dora", "full"):
        raise ConfigurationError(f"{path}: fine_tune_type is {kind!r}; expected lora, dora, full.")
    if type(layers) is not int:
        raise ConfigurationError(f"{path}: num_layers is {layers!r}; expected an integer.")
    if kind == "full":
        # The blocks alone: mlx-lm leaves embeddings, final norm and head as they are.
        start = given.get("resume_adapter_file")
        return {"last_layers": layers if layers > 0 else -1, "head": False, "start_from": start}
    parameters = given["lora_parameters"]
    if not isinstance(parameters, dict):
        raise ConfigurationError(f"{path}: lora_parameters expects a table.")
    for key in parameters:
        if key not in ("rank", "scale", "dropout", "keys"):
            raise ConfigurationError(
                f"{path}: lora_parameters has no key {key!r}."
                f"{nearest(str(key), ('rank', 'scale', 'dropout', 'keys'))} mlx-lm writes "
                "scale = alpha / rank."
            )
    rank = parameters.get("rank", 8)
    scale: Any = parameters.get("scale")
    if type(rank) is not int or rank < 1 or type(scale) not in (int, float):
        raise ConfigurationError(
            f"{path}: lora_parameters has rank {rank!r} and scale {scale!r}; expected numbers."
        )
    found = {
        "lora_rank": rank,
        "lora_alpha": float(scale * rank),
        "lora_dropout": parameters.get("dropout", 0.0),
        "dora": kind == "dora",
    }
    if layers > 0:
        found["lora_layers"] = layers
    if parameters.get("keys"):
        found["lora_targets"] = parameters["keys"]
    if given.get("resume_adapter_file"):
        found["start_from"] = given["resume_adapter_file"]
    return found


def _count(given: Mapping[str, Any], key: str, path: Path) -> int:
    value = given[key]
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{path}: {key} is {value!r}; expected an integer of at least 1.")
    return value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads ``1e-5`` as a text; mlx-lm reads a number."""
    if isinstance(value, dict):
        return {key: _numbers(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_numbers(child) for child in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value
