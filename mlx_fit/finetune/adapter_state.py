"""What adapter files hold, whatever their layout: settings and arrays by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import named_arrays
from mlx_fit.errors import CheckpointCorruptError
from mlx_fit.finetune.adapter_layers import LEAVES, AdapterLayer, LayerSettings, adapters_of


@dataclass
class AdapterState:
    """The adapters of a model, and what else of it trains.

    Attributes:
        settings: dotted name of a layer -> rank, scale, dropout.
        arrays: ``<layer>.lora_a``, ``.lora_b``, ``.m`` -> array.
        others: dotted names of other parameters -> array; a name that ends in ``bias`` of an
            adapted layer is that of its base.
        frozen: such parameters that the file brings along without training them.
    """

    settings: dict[str, LayerSettings] = field(default_factory=dict)
    arrays: dict[str, mx.array] = field(default_factory=dict)
    others: dict[str, mx.array] = field(default_factory=dict)
    frozen: dict[str, mx.array] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> AdapterState:
        """The state of a model as it is."""
        layers = adapters_of(model)
        state = cls({name: layer.settings for name, layer in layers.items()})
        own = {f"{name}.{leaf}" for name in layers for leaf in LEAVES if leaf in layers[name]}
        arrays = dict(named_arrays(model.parameters()))
        state.arrays = {name: arrays[name] for name in sorted(own)}
        trainable = [name for name, _ in named_arrays(model.trainable_parameters())]
        state.others = {
            base_name(name, layers): arrays[name] for name in trainable if name not in own
        }
        return state


def base_name(name: str, layers: dict[str, AdapterLayer]) -> str:
    """A parameter's name in the base: ``q_proj.linear.bias`` is its ``q_proj.bias``."""
    owner, _, leaf = name.rpartition(".")
    layer, _, key = owner.rpartition(".")
    return f"{layer}.{leaf}" if layer in layers and key == layers[layer].base_key else name


def number(config: dict[str, Any], key: str, path: Path, *, default: Any = None) -> float:
    """A finite number of a configuration.

    Raises:
        CheckpointCorruptError: it is missing or something else.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointCorruptError(
            f"{path}: {key!r} is {value!r}; expected a number.", path=path, expected=key, got=value
        )
    return value


def whole(config: dict[str, Any], key: str, path: Path) -> int:
    """An integer of at least 1 of a configuration; otherwise as :func:`number`."""
    value = number(config, key, path)
    if value != int(value) or value < 1:
        raise CheckpointCorruptError(
            f"{path}: {key!r} is {value!r}; expected an integer of at least 1.",
            path=path,
            expected=key,
            got=value,
        )
    return int(value)


def probability(config: dict[str, Any], key: str, path: Path) -> float:
    """A dropout probability of a configuration; otherwise as :func:`number`."""
    value = number(config, key, path, default=0.0)
    if not 0 <= value < 1:
        raise CheckpointCorruptError(
            f"{path}: {key!r} is {value!r}; expected a number in [0, 1).", path=path, got=value
        )
    return float(value)


def only(values: Iterable[Any]) -> Any:
    """The one value that all are equal to, or None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
