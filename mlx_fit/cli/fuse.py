"""Write a model with its adapters merged, as a folder that mlx-lm loads."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit import finetune
from mlx_fit.cli.finetune_settings import MODEL_SETTINGS
from mlx_fit.cli.language_models import Loaded, import_mlx_lm, load_adapted
from mlx_fit.cli.settings import Setting, add_flags, checking_usage, resolve
from mlx_fit.errors import CheckpointWriteError, ConfigurationError
from mlx_fit.finetune.adapter_layers import adapters_of

SETTINGS = (
    *MODEL_SETTINGS,
    Setting("adapter_path", str, "adapters", "folder with adapters, of mlx-lm or PEFT"),
    Setting("save_path", str, "fused", "folder to write; must not exist, or be empty"),
    Setting(
        "requantize", bool, False, "pack fused layers as they were; refused if that loses them"
    ),
    Setting("dequantize", bool, False, "write all layers unpacked, not the fused ones alone"),
    Setting(
        "tolerance",
        float,
        None,
        "largest difference of a logit, by the largest (default: what rounding explains; with "
        "--requantize a tenth of what the adapters do)",
        least=0.0,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit fuse``."""
    add_flags(parser, SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    """Fuse and write."""
    with checking_usage():
        settings = _read(arguments)
    loaded = load_adapted(settings)
    model, config = loaded.model, dict(loaded.config)
    if adapters_of(model):
        size = min(_vocabulary(model), 64)
        names = finetune.fuse(
            model,
            mx.arange(size)[None],
            quantize=settings.requantize,
            tolerance=settings.tolerance,
        )
        print(f"{len(names)} layers fused.")
    else:
        print("The folder holds whole parameters, no adapters: they are in place.")
    if settings.dequantize:
        config = _dequantized(model, config)
    mixed = "quantization" in config and adapters_were_unpacked(model, config)
    _write(loaded._replace(config=config), settings)
    note = " Fused layers are not quantized, the others are." if mixed else ""
    print(f"{settings.save_path} is a model that mlx-lm loads.{note}")
    return 0


def _read(arguments: argparse.Namespace) -> argparse.Namespace:
    settings, _ = resolve(arguments, SETTINGS, {}, "")
    if settings.model is None:
        raise ConfigurationError("--model is missing.")
    if settings.requantize and settings.dequantize:
        raise ConfigurationError("--requantize and --dequantize exclude each other: give one.")
    path = Path(settings.save_path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigurationError(
            f"--save-path {settings.save_path} is there already; nothing is overwritten."
        )
    return settings


def _vocabulary(model: nn.Module) -> int:
    tables = (nn.Embedding, nn.QuantizedEmbedding)
    rows = [m.weight.shape[0] for m in model.modules() if isinstance(m, tables)]
    return max(rows, default=1)


def adapters_were_unpacked(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether a quantized model has plain linear layers now."""
    width = config["quantization"].get("group_size", 64)
    plain = [m for m in model.modules() if type(m) is nn.Linear]
    return any(m.weight.shape[-1] % width == 0 for m in plain)


def _dequantized(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    import_mlx_lm()
    from mlx_lm.utils import dequantize_model

    dequantize_model(model)
    return {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}


def _write(loaded: Loaded, settings: argparse.Namespace) -> None:
    """The folder, whole or not at all."""
    import_mlx_lm()
    from mlx_lm.utils import save

    path = Path(settings.save_path).expanduser()
    staged = path.with_name(f".tmp-{os.urandom(8).hex()}-{path.name}")
    source = Path(settings.model).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(
            staged,
            str(source) if source.exists() else settings.model,
            loaded.model,
            loaded.tokenizer,
            dict(loaded.config),
            donate_model=False,
        )
        if path.exists():
            path.rmdir()
        staged.rename(path)
    except OSError as error:
        raise CheckpointWriteError(f"{path} could not be written: {error}", path=path) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
