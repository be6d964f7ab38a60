"""The layout of mlx-lm's adapters (0.32): ``adapters.safetensors`` with ``adapter_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.errors import CheckpointCorruptError, ConfigurationError
from mlx_fit.finetune.adapter_layers import (
    LEAVES,
    LayerSettings,
    LoRAConv,
    LoRASwitchLinear,
    adapters_of,
)
from mlx_fit.finetune.adapter_state import AdapterState, number, only, probability, whole
from mlx_fit.finetune.blocks import find_blocks, is_embedding, is_quantized, listed

ARRAYS = "adapters.safetensors"
INSTEAD = "Save with format='peft', or merge() and save the weights."


def to_mlx_lm(model: nn.Module, state: AdapterState) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Configuration and arrays of a model's adapters, or of what trains where it has none.

    Raises:
        ConfigurationError: this layout cannot hold them.
    """
    blocks = find_blocks(model)
    config: dict[str, Any] = {"num_layers": len(blocks.modules) if blocks else -1}
    if not state.settings:
        config |= {"fine_tune_type": "full", "lora_parameters": {}}
        return config, state.others
    _refuse(model, state)
    setting = next(iter(state.settings.values()))
    config["fine_tune_type"] = "dora" if setting.dora else "lora"
    # Full names are exact: mlx-lm looks them up in the whole model, whatever num_layers is.
    config["lora_parameters"] = {
        "rank": setting.rank,
        "scale": setting.scale,
        "dropout": setting.dropout,
        "keys": [*state.settings],
    }
    return config, state.arrays


def _refuse(model: nn.Module, state: AdapterState) -> None:
    """Raise for what mlx-lm would refuse, lose or misread."""
    if state.others:
        raise ConfigurationError(
            f"mlx-lm's adapter files hold adapters alone, and {listed(state.others)} train as "
            f"well. {INSTEAD}"
        )
    for what in ("rank", "scale", "dora"):
        if only(getattr(setting, what) for setting in state.settings.values()) is None:
            raise ConfigurationError(
                f"mlx-lm's adapter files hold one {what} for all layers, and these have several. "
                f"{INSTEAD}"
            )
    for name, layer in adapters_of(model).items():
        base, reason = layer.base, ""
        if isinstance(layer, LoRAConv):
            reason = "a convolution"
        elif layer.settings.dora and isinstance(layer, LoRASwitchLinear):
            reason = "DoRA on a layer of experts"
        elif layer.settings.dora and is_quantized(base):
            if is_embedding(base):
                reason = "DoRA on a quantized embedding"
            elif 32 % base.bits:
                reason = f"DoRA on a base of {base.bits} bits, whose width it gets wrong"
        if reason:
            raise ConfigurationError(f"mlx-lm cannot load {name}: {reason}. {INSTEAD}")


def from_mlx_lm(config: dict[str, Any], arrays: dict[str, mx.array], path: Path) -> AdapterState:
    """The state that a configuration (at ``path``) and arrays describe.

    Raises:
        CheckpointCorruptError: the configuration is not one of mlx-lm's.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        return AdapterState(others=arrays)
    parameters = config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict):
        raise CheckpointCorruptError(
            f"{path}: fine_tune_type is {kind!r} and lora_parameters a "
            f"{type(parameters).__name__}; expected 'lora', 'dora' or 'full' with a dict.",
            path=path,
            got=kind,
        )
    setting = LayerSettings(
        whole(parameters, "rank", path),
        float(number(parameters, "scale", path)),
        probability(parameters, "dropout", path),
        kind == "dora",
    )
    state = AdapterState()
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in LEAVES:
            state.arrays[name] = array
            state.settings[layer] = setting
        else:
            state.others[name] = array
    # A layer that the configuration names by its whole name must be in the file. Names inside of a
    # block are told from these by the blocks of the model, which is not known here.
    keys = parameters.get("keys") or []
    if any(key in state.settings for key in keys if isinstance(key, str)):
        state.settings |= dict.fromkeys([key for key in keys if isinstance(key, str)], setting)
    return state
