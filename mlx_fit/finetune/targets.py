"""Which layers get an adapter: names, ends of names and patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.nn as nn

from mlx_fit.checks import natural
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import is_adaptable
from mlx_fit.finetune.blocks import (
    is_linear,
    is_switch,
    listed,
    nearest,
    ordered_modules,
    require_blocks,
)


def targeted(model: nn.Module, targets: Iterable[str] | str | None) -> list[str]:
    """Names of the layers to adapt, in the model's order.

    Args:
        model: the model.
        targets: names of layers, the ends of such, or patterns; None: every linear layer in the
            blocks, never the head.

    Raises:
        ConfigurationError: a target stands for no layer that can be adapted; lists those that can.
    """
    modules = dict(ordered_modules(model))
    candidates = [name for name, module in modules.items() if name and is_adaptable(module)]
    if targets is None:
        blocks = require_blocks(model, "targets=None")
        kinds = [n for n in candidates if is_linear(modules[n]) or is_switch(modules[n])]
        names = [name for name in kinds if blocks.holds(name)]
        if not names:
            raise ConfigurationError(
                f"targets=None adapts the linear layers in {blocks.path}, which holds none. Name "
                f"layers with targets=[...]: {listed(_endings(candidates))}."
            )
        return names
    if not isinstance(targets, Iterable):
        raise ConfigurationError(f"targets={targets!r}; expected names of layers.")
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ConfigurationError(f"targets is empty; choose from {listed(_endings(candidates))}.")
    found: set[str] = set()
    for target in wanted:
        matches = {name for name in candidates if is_target(name, target)}
        if not matches:
            other = [name for name in modules if name and is_target(name, target)]
            why = f" {other[0]} is a {type(modules[other[0]]).__name__}." if other else ""
            raise ConfigurationError(
                f"targets: no layer is called {target!r}.{why}{nearest(str(target), candidates)} "
                f"Layers that can be adapted: {listed(_endings(candidates))}."
            )
        found |= matches
    return [name for name in candidates if name in found]


def is_target(name: str, target: str) -> bool:
    """Whether a target stands for a layer: its name, the end of it, or a pattern."""
    if not isinstance(target, str) or not target:
        raise ConfigurationError(f"targets holds {target!r}; expected names of layers.")
    return f".{name}".endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _endings(names: Iterable[str]) -> list[str]:
    """Names without the number of their block, each once."""
    return [
        *dict.fromkeys(name.split(".", 1)[-1] if "." not in name else _tail(name) for name in names)
    ]


def _tail(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) or name if numbers else name


def in_last_layers(model: nn.Module, names: list[str], last_layers: int) -> list[str]:
    """The names that do not lie in an earlier block than the last ``last_layers``.

    Raises:
        ConfigurationError: there are fewer blocks, or no name is left.
    """
    blocks = require_blocks(model, "last_layers")
    count = len(blocks.modules)
    if natural("last_layers", last_layers, 1) > count:
        raise ConfigurationError(
            f"last_layers={last_layers}, but {blocks.path} has {count} blocks."
        )
    first = tuple(f"{blocks.name(index)}." for index in range(count - last_layers))
    kept = [name for name in names if not f"{name}.".startswith(first)] if first else names
    if not kept:
        raise ConfigurationError(
            f"No target lies in the last {last_layers} blocks of {blocks.path}: {listed(names)}."
        )
    return kept


def by_pattern(
    argument: str, pattern: Mapping[str, Any] | None, names: list[str], default: Any
) -> dict[str, Any]:
    """A value for each name: the last entry of ``pattern`` that stands for it, else ``default``.

    Args:
        argument: what the user calls ``pattern``, for the message.
        pattern: target -> value.
        names: the adapted layers.
        default: for names without an entry.

    Raises:
        ConfigurationError: an entry stands for none of the names.
    """
    if pattern is not None and not isinstance(pattern, Mapping):
        raise ConfigurationError(f"{argument}={pattern!r}; expected a dict of target -> value.")
    values = dict.fromkeys(names, default)
    for target, value in (pattern or {}).items():
        matches = [name for name in names if is_target(name, target)]
        if not matches:
            raise ConfigurationError(
                f"{argument}: {target!r} is no adapted layer.{nearest(target, names)} Adapted: "
                f"{listed(names)}."
            )
        values.update(dict.fromkeys(matches, value))
    return values
