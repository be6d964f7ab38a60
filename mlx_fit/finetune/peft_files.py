"""The layout of PEFT (0.21): ``adapter_model.safetensors`` with ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.errors import CheckpointCorruptError, ConfigurationError
from mlx_fit.finetune.adapter_layers import (
    AdapterLayer,
    LayerSettings,
    LoRAConv,
    LoRAEmbedding,
    LoRASwitchLinear,
    adapters_of,
    base_modules,
    is_adaptable,
)
from mlx_fit.finetune.adapter_state import AdapterState, number, probability, whole
from mlx_fit.finetune.blocks import find_tied, listed, ordered_modules
from mlx_fit.finetune.select import own_parameters

ARRAYS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<factor>[AB])|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
# Kinds of adapters that our layers do not compute.
OTHER_KINDS = (
    *("lora_bias", "use_qalora", "use_bdlora", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config"),
)
# Beginnings that PEFT takes out of the base's weights again whenever it loads.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


# --- writing --------------------------------------------------------------------------------------


def to_peft(model: nn.Module, state: AdapterState) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Configuration and arrays of a model's adapters.

    Raises:
        ConfigurationError: this layout cannot hold them.
    """
    layers = adapters_of(model)
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} has no adapters, and PEFT's layout is for adapters. Use "
            "format='mlx-lm' for what select() trains."
        )
    found: dict[str, mx.array] = {}
    for name, layer in layers.items():
        for key, array in _peft_arrays(name, layer).items():
            found[f"{PREFIX}{name}.{key}"] = array
    bias, saved, others = _others(model, state, layers)
    ranks = {name: setting.rank for name, setting in state.settings.items()}
    alphas = {name: s.scale * s.rank for name, s in state.settings.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    setting = next(iter(state.settings.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if find_tied(model) else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": setting.dropout,
        "target_modules": [*state.settings],
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _plain(a) for name, a in alphas.items() if a != alpha},
        "use_dora": setting.dora,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": bias,
        "modules_to_save": saved or None,
    }
    return config, found | others


def _peft_arrays(name: str, layer: AdapterLayer) -> dict[str, mx.array]:
    a, b = layer.lora_a, layer.lora_b
    if isinstance(layer, LoRASwitchLinear):
        raise ConfigurationError(
            f"PEFT's layout has no adapters for layers of experts, as {name}. Use format='mlx-lm', "
            "or merge() and save the weights."
        )
    if isinstance(layer, LoRAEmbedding):
        if layer.settings.dora:
            raise ConfigurationError(
                f"PEFT's DoRA has one magnitude for each dimension of an embedding, ours one for "
                f"each row: {name}. Use format='mlx-lm', or merge() and save the weights."
            )
        return {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    if isinstance(layer, LoRAConv):
        kernel = a.ndim - 2
        found = {
            "lora_A.weight": mx.moveaxis(a, -1, 1),
            "lora_B.weight": b.T.reshape(*b.T.shape, *(1,) * kernel),
        }
        if layer.settings.dora:
            found["lora_magnitude_vector"] = layer.m.reshape(1, -1, *(1,) * kernel)
        return found
    found = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    return found | ({"lora_magnitude_vector": layer.m} if layer.settings.dora else {})


def _others(
    model: nn.Module, state: AdapterState, layers: dict[str, AdapterLayer]
) -> tuple[str, list[str], dict[str, mx.array]]:
    """How PEFT calls the biases that train, the modules to save whole, and their arrays."""
    names = {name for name in state.others if name.rpartition(".")[2] != "bias"}
    biases = set(state.others) - names
    adapted = {name for name in biases if name.rpartition(".")[0] in layers}
    all_biases = _all_biases(model, layers)
    bias = "none"
    if biases and biases == all_biases:
        bias = "all"
    elif biases and biases == {name for name in all_biases if name.rpartition(".")[0] in layers}:
        bias = "lora_only"
    else:
        names |= biases
    saved = sorted({name.rpartition(".")[0] for name in names})
    modules = dict(ordered_modules(model))
    partly = [
        name
        for name in saved
        if name in layers or {f"{name}.{key}" for key in own_parameters(modules[name])} - names
    ]
    if partly:
        raise ConfigurationError(
            f"PEFT's layout holds adapters, all biases or whole modules; only parts of "
            f"{listed(partly)} train. Train them whole, or merge() and save the weights."
        )
    arrays = {}
    for name, array in state.others.items():
        layer, _, leaf = name.rpartition(".")
        arrays[f"{PREFIX}{layer}.base_layer.{leaf}" if name in adapted else PREFIX + name] = array
    return bias, saved, arrays


def _all_biases(model: nn.Module, layers: dict[str, AdapterLayer]) -> set[str]:
    found = set()
    for name, module in ordered_modules(model):
        layer, _, key = name.rpartition(".")
        is_base = layer in layers and key == layers[layer].base_key
        if isinstance(module.get("bias"), mx.array):
            found.add(f"{layer if is_base else name}.bias")
    return found


def _plain(value: float) -> float | int:
    value = round(value, 9)  # scale * rank in binary is not always alpha
    return int(value) if value == int(value) else value


# --- reading --------------------------------------------------------------------------------------


def from_peft(
    model: nn.Module, config: dict[str, Any], arrays: dict[str, mx.array], path: Path
) -> AdapterState:
    """The state that a configuration (at ``path``) and arrays describe, for this model.

    Raises:
        CheckpointCorruptError: the configuration is none of a LoRA.
        ConfigurationError: it is of a kind of adapter that is not computed here.
    """
    if config.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' (with or without DoRA) "
            "can be loaded."
        )
    if used := [key for key in OTHER_KINDS if config.get(key)]:
        raise ConfigurationError(f"{path} uses {', '.join(used)}, which cannot be loaded here.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASES):
        raise ConfigurationError(
            f"{path}: init_lora_weights is {start!r}, whose adapters belong to a changed base. "
            "Save them for the base as it is, with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    _check_config(config, path)
    state = AdapterState()
    saved = tuple(config.get("modules_to_save") or ())
    modules = base_modules(model)
    for key, array in arrays.items():
        name = key.removeprefix(PREFIX)
        match = FACTOR.fullmatch(name)
        if match:
            layer = match["layer"]
            state.settings[layer] = _setting(config, layer, path)
            state.arrays |= _our_arrays(modules.get(layer), layer, match, array, path)
            continue
        layer, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        is_saved = layer.endswith(saved) if saved else False
        if leaf == "bias" or is_saved or not is_adaptable(modules.get(layer, nn.Identity())):
            state.others[f"{layer}.{leaf}"] = array
        else:
            state.frozen[f"{layer}.{leaf}"] = array  # PEFT adds the embeddings that it adapts
    return state


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raise for values of another type than PEFT writes."""
    saved = config.get("modules_to_save")
    if saved is not None and not (
        isinstance(saved, list) and all(isinstance(name, str) for name in saved)
    ):
        raise CheckpointCorruptError(
            f"{path}: modules_to_save is {saved!r}; expected a list of names.", path=path, got=saved
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_pattern, patterns)):
            raise CheckpointCorruptError(
                f"{path}: {key} is {patterns!r}; expected patterns of names with a number each.",
                path=path,
                got=patterns,
            )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _setting(config: dict[str, Any], layer: str, path: Path) -> LayerSettings:
    rank = whole(_patterned(config, "rank_pattern", "r", layer), "r", path)
    alpha = number(_patterned(config, "alpha_pattern", "lora_alpha", layer), "lora_alpha", path)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    dropout = probability(config, "lora_dropout", path)
    return LayerSettings(rank, float(scale), dropout, bool(config.get("use_dora")))


def _patterned(config: dict[str, Any], patterns: str, key: str, layer: str) -> dict[str, Any]:
    """The configuration with what a pattern says of this layer under ``key``."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return {**config, key: value}
    return config


def _our_arrays(
    base: nn.Module | None, layer: str, match: re.Match[str], array: mx.array, path: Path
) -> dict[str, mx.array]:
    if match["factor"] is None:
        if match["embedding"] or isinstance(base, (nn.Embedding, nn.QuantizedEmbedding)):
            raise ConfigurationError(
                f"{path}: PEFT's DoRA of an embedding ({layer}) has one magnitude for each "
                "dimension, ours one for each row; it cannot be loaded."
            )
        return {f"{layer}.m": array.reshape(-1)}
    leaf = "lora_a" if match["factor"] == "A" else "lora_b"
    if array.ndim > 2:  # a convolution
        array = mx.moveaxis(array, 1, -1) if leaf == "lora_a" else array.reshape(len(array), -1).T
    elif array.ndim == 2:
        array = array.T
    else:
        raise CheckpointCorruptError(
            f"{path.with_name(ARRAYS)}: {match.group()} has shape {array.shape}; expected two "
            "axes.",
            path=path.with_name(ARRAYS),
            got=array.shape,
        )
    return {f"{layer}.{leaf}": array}
