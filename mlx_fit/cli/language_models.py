"""Language models and their adapters from folders, through mlx-lm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_fit import finetune
from mlx_fit.errors import ConfigurationError

BITS = (2, 3, 4, 5, 6, 8)


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and its ``config.json``."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]


def import_mlx_lm() -> Any:
    """The package, without its chatter.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import mlx_lm
        import mlx_lm.utils
    except ImportError as error:
        raise ConfigurationError(
            f"This command needs mlx-lm ({error}): pip install 'mlx-fit[lm]'."
        ) from error
    return mlx_lm


def load_model(settings: argparse.Namespace) -> Loaded:
    """The model of ``--model``, quantized by ``--quantize``.

    Raises:
        ConfigurationError: there is none, or it cannot be quantized so.
    """
    mlx_lm = import_mlx_lm()
    path = Path(settings.model).expanduser()
    name = str(path) if path.exists() else settings.model
    if not path.exists() and (path.is_absolute() or settings.model.count("/") != 1):
        raise ConfigurationError(f"--model {settings.model}: there is no such folder.")
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigurationError(
            f"--model {settings.model}: no config.json there; expected a folder with config.json, "
            "*.safetensors and a tokenizer, as mlx_lm.convert and Hugging Face write it."
        )
    trust = {"trust_remote_code": settings.trust_remote_code}
    try:
        model, tokenizer, config = mlx_lm.load(
            name, tokenizer_config=trust, return_config=True, **trust
        )
    except Exception as error:  # of many kinds: files, the hub, a class that mlx-lm does not have
        reason = " ".join(str(error).split()) or repr(error)
        raise ConfigurationError(
            f"--model {settings.model} could not be loaded: {reason[:300]}"
        ) from error
    if settings.quantize is not None:
        config = _quantized(model, config, settings.quantize, settings.quantize_group_size)
    return Loaded(model, tokenizer, config)


def load_adapted(settings: argparse.Namespace) -> Loaded:
    """The model with the adapters of ``--adapter-path``, if any, in mlx-lm's layout or PEFT's."""
    loaded = load_model(settings)
    if settings.adapter_path is not None:
        finetune.load_adapters(loaded.model, settings.adapter_path)
        loaded.model.eval()
    return loaded


def _quantized(
    model: nn.Module, config: dict[str, Any], bits: int, group_size: int
) -> dict[str, Any]:
    """Quantize a model in place as mlx-lm does; its configuration that says so."""
    if bits not in BITS:
        raise ConfigurationError(f"--quantize {bits}; MLX has {', '.join(map(str, BITS))} bits.")
    if "quantization" in config:
        found = config["quantization"].get("bits")
        raise ConfigurationError(
            f"--quantize {bits}, but the model is quantized already, to {found} bits: leave "
            "--quantize out."
        )
    decides = getattr(model, "quant_predicate", None)
    own = {"group_size": group_size, "bits": bits}
    table: dict[str, Any] = dict(own)

    def chosen(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        decided = True if decides is None else decides(path, module)
        if isinstance(decided, dict):
            table[path] = decided
        return decided

    try:
        nn.quantize(model, group_size, bits, class_predicate=chosen)
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"--quantize {bits} with --quantize-group-size {group_size}: {error}"
        ) from error
    if not any(isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for m in model.modules()):
        raise ConfigurationError(
            f"--quantize {bits} leaves the model as it is: no layer's width is a multiple of "
            f"--quantize-group-size {group_size}. Choose 32, 64 or 128, smaller than its layers."
        )
    mx.eval(model.parameters())
    return {**config, "quantization": table, "quantization_config": table}
