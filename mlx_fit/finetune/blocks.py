"""Where a model keeps its transformer blocks, its output projection and its linear layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.errors import ConfigurationError

HEADS = ("lm_head", "head", "output", "classifier", "score", "embed_out", "output_layer")


class Blocks(NamedTuple):
    """The stack of blocks of a model: the dotted name of its list, and its modules."""

    path: str
    modules: list[nn.Module]

    def name(self, index: int) -> str:
        """The dotted name of a block."""
        return f"{self.path}.{index}"

    def holds(self, name: str) -> bool:
        """Whether a dotted name lies in a block."""
        return name.startswith(f"{self.path}.")


def ordered_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """All modules by dotted name, in the order of their definition.

    Raises:
        ConfigurationError: ``model`` is no ``mlx.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}; expected an mlx.nn.Module.")
    found: list[tuple[str, nn.Module]] = [(prefix, model)]
    for key, value in model.items():
        path = f"{prefix}.{key}" if prefix else key
        found += _modules_in(value, path)
    return found


def _modules_in(value: Any, path: str) -> list[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        return ordered_modules(value, path)
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [found for key, item in items for found in _modules_in(item, f"{path}.{key}")]


def find_blocks(model: nn.Module) -> Blocks | None:
    """The longest list of modules of one type that lies in no other such list, or None.

    Lists of several types (hybrid models) count where there is no list of one type.
    """
    lists = [
        (f"{name}.{key}" if name else key, value, module)
        for name, module in ordered_modules(model)
        for key, value in module.items()
        if isinstance(value, list) and value and all(isinstance(v, nn.Module) for v in value)
    ]
    uniform = [(path, value) for path, value, _ in lists if len({type(v) for v in value}) == 1]
    mixed = [(path, value) for path, value, m in lists if not isinstance(m, nn.Sequential)]
    for candidates in (uniform, mixed):
        outer = [
            Blocks(path, value)
            for path, value in candidates
            if not any(path.startswith(f"{other}.") for other, _ in candidates)
        ]
        if outer:
            return max(outer, key=lambda blocks: len(blocks.modules))
    return None


def require_blocks(model: nn.Module, argument: str) -> Blocks:
    """The blocks of a model.

    Raises:
        ConfigurationError: it has none.
    """
    blocks = find_blocks(model)
    if blocks is None:
        raise ConfigurationError(
            f"{argument} needs a stack of blocks, a list of modules of one type, and "
            f"{type(model).__name__} has none. Its modules: {listed(names_of(model))}."
        )
    return blocks


def names_of(model: nn.Module) -> list[str]:
    """Dotted names of all modules but the model itself."""
    return [name for name, _ in ordered_modules(model) if name]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a (quantized) linear layer."""
    return isinstance(module, (nn.Linear, nn.QuantizedLinear))


def is_switch(module: nn.Module) -> bool:
    """Whether a module is a linear layer of several experts, as mlx-lm's ``SwitchLinear``."""
    weight = module.get("weight")
    names = [kind.__name__ for kind in type(module).__mro__]
    is_named = "SwitchLinear" in names or "QuantizedSwitchLinear" in names
    return is_named and isinstance(weight, mx.array) and weight.ndim == 3


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is a (quantized) embedding."""
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is packed into integers."""
    weight = module.get("weight")
    return "scales" in module and isinstance(weight, mx.array) and weight.dtype == mx.uint32


def find_head(model: nn.Module, blocks: Blocks | None) -> tuple[str, nn.Module] | None:
    """The output projection: a linear layer outside the blocks by a usual name, else the last one.

    A linear layer defined before the blocks (as for the patches of images) is none. None where
    there is no such layer: the model is tied, or has no head.
    """
    inside = f"{blocks.path}." if blocks else None
    found, is_past = [], blocks is None
    for name, module in ordered_modules(model):
        if inside is not None and name.startswith(inside):
            is_past = True
        elif is_linear(module) and (is_past or name.rsplit(".", 1)[-1] in HEADS):
            found.append((name, module))
    named = [item for item in found if item[0].rsplit(".", 1)[-1] in HEADS]
    return next(reversed(named or found), None)


def find_tied(model: nn.Module) -> str | None:
    """The dotted name of the token embedding, which a tied model projects with, or None."""
    names = [name for name, module in ordered_modules(model) if is_embedding(module)]
    usual = [name for name in names if name.endswith(("embed_tokens", "wte", "tok_embeddings"))]
    return next(iter(usual or names), None)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with a dotted name."""
    *path, last = name.split(".")
    container: Any = model
    for part in path:
        container = container[int(part) if isinstance(container, (list, tuple)) else part]
    if isinstance(container, list):
        container[int(last)] = module
    else:
        dict.__setitem__(container, last, module)


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names for a message, the first few of many; blocks that repeat are left out."""
    unique = list(dict.fromkeys(names))
    more = f", ... ({len(unique)} in all)" if len(unique) > limit else ""
    return (", ".join(unique[:limit]) or "none") + more


def nearest(word: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    parts = {part for name in names for part in (name, name.rsplit(".", 1)[-1])}
    close = difflib.get_close_matches(word, parts, 1)
    return f" Did you mean {close[0]!r}?" if close else ""
