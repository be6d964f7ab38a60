"""Which parameters train: the last blocks, the head, or what patterns and kinds name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import leaves
from mlx_fit.checks import boolean, natural
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.blocks import (
    Blocks,
    find_blocks,
    find_head,
    find_tied,
    is_embedding,
    is_quantized,
    listed,
    names_of,
    nearest,
    ordered_modules,
    require_blocks,
)

IS_REGULAR = re.compile(r"[\\^$()|+{}]|\.\*")  # what names and shell patterns do not have


def select(
    model: nn.Module,
    last_layers: int | None = None,
    head: bool | None = None,
    patterns: Iterable[str | re.Pattern[str]] | str | re.Pattern[str] = (),
    *,
    types: Iterable[type | str] | type | str = (),
    biases: bool = False,
    norms: bool = False,
    embeddings: bool = False,
) -> list[str]:
    """Freeze the model except for what is named here; the choices add up.

    Running statistics, integers and the weights of quantized layers never train: of a quantized
    block its norms and biases do.

    Args:
        model: any ``mlx.nn.Module``, changed in place.
        last_layers: number of blocks from the end, of the longest list of modules of one type.
        head: whether the output projection trains (it alone, not the norm before it). None: with
            ``last_layers``, or with nothing else chosen, where there is one of its own.
        patterns: names of modules or parameters, whole components of the dotted name with shell
            wildcards: ``"q_proj"``, ``"self_attn.*.weight"``, ``"layers.[01]"``. A regular
            expression, compiled or with signs that names do not have, is searched for.
        types: module classes, or their names.
        biases: every parameter called ``bias``.
        norms: every module whose class is called a norm.
        embeddings: every embedding that is not quantized.

    Returns:
        The dotted names of what trains.

    Raises:
        ConfigurationError: something chosen does not exist; the message lists what does.

    Example:
        >>> import mlx.nn as nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> select(model, norms=True)
        ['layers.1.bias', 'layers.1.weight']
    """
    for name, flag in (("biases", biases), ("norms", norms), ("embeddings", embeddings)):
        boolean(name, flag)
    table = _Parameters(model)
    blocks = find_blocks(model)
    chosen: set[str] = set()
    if last_layers is not None:
        chosen |= table.within(_last(require_blocks(model, "last_layers"), last_layers))
    for pattern in [patterns] if isinstance(patterns, (str, re.Pattern)) else patterns:
        chosen |= table.matching(pattern)
    for kind in [types] if isinstance(types, (str, type)) else types:
        chosen |= table.of_type(kind)
    if biases:
        chosen |= table.required("biases", {n for n in table.names if n.split(".")[-1] == "bias"})
    if norms:
        chosen |= table.required("norms", table.of(lambda m: "norm" in type(m).__name__.lower()))
    if embeddings:
        chosen |= table.required("embeddings", table.of(is_embedding))
    if head is None:
        own = find_head(model, blocks)
        head = own is not None and not is_quantized(own[1])
        head = head and (last_layers is not None or not chosen)
    if boolean("head", head):
        chosen |= table.within([_head(model, blocks)])
    names = sorted(chosen - table.untrainable)
    if not names:
        left_out = f" {listed(sorted(chosen))} cannot train: quantized, or no weights." * bool(
            chosen
        )
        raise ConfigurationError(
            f"select() leaves nothing to train in {type(model).__name__}.{left_out} Choose with "
            "last_layers, head, patterns, types, biases, norms or embeddings; for quantized layers "
            "use apply_lora."
        )
    freeze(model)
    table.unfreeze(names)
    return names


def freeze(model: nn.Module) -> None:
    """Freeze everything, also arrays in lists, which ``Module.freeze`` leaves trainable."""
    for _, module in ordered_modules(model):
        module.freeze(recurse=False, keys=[*own_parameters(module)])


def own_parameters(module: nn.Module) -> dict[str, list[str]]:
    """Keys of a module's own parameters -> the paths of their arrays below it."""
    found = {}
    for key, value in module.items():
        if key.startswith("_") or isinstance(value, nn.Module):
            continue
        arrays = [(path, leaf) for path, leaf in leaves(value, key) if isinstance(leaf, mx.array)]
        if arrays and not any(isinstance(m, nn.Module) for m in _containers(value)):
            found[key] = [path for path, _ in arrays]
    return found


def _containers(value: Any) -> list[Any]:
    if not isinstance(value, (dict, list, tuple)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *[found for item in inner for found in _containers(item)]]


class _Parameters:
    """The parameters of a model by dotted name, each with its module."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(ordered_modules(model))
        self._keys: dict[str, tuple[nn.Module, str]] = {}
        self._owners: dict[str, str] = {}
        self.untrainable: set[str] = set()
        for owner, module in self._modules.items():
            for key, paths in own_parameters(module).items():
                for path in paths:
                    name = f"{owner}.{path}" if owner else path
                    self._keys[name] = (module, key)
                    self._owners[name] = owner
                    if _is_untrainable(module, key):
                        self.untrainable.add(name)

    @property
    def names(self) -> list[str]:
        return [*self._keys]

    def within(self, modules: Iterable[str]) -> set[str]:
        prefixes = tuple(f"{name}." for name in modules)
        return {name for name in self._keys if name.startswith(prefixes)}

    def of(self, test: Any) -> set[str]:
        return {name for name, owner in self._owners.items() if test(self._modules[owner])}

    def of_type(self, kind: type | str) -> set[str]:
        """Everything in modules of a class."""
        if isinstance(kind, str):
            own = [n for n, m in self._modules.items() if _has_name(m, kind)]
        elif isinstance(kind, type) and issubclass(kind, nn.Module):
            own = [n for n, m in self._modules.items() if isinstance(m, kind)]
        else:
            raise ConfigurationError(
                f"types={kind!r}; expected classes of modules, or their names."
            )
        if not own:
            have = sorted({type(module).__name__ for module in self._modules.values()})
            word = kind if isinstance(kind, str) else kind.__name__
            raise ConfigurationError(
                f"types names {word!r}, and {type(self._model).__name__} has no such module."
                f"{nearest(word, have)} It has {', '.join(have)}."
            )
        return set(self._keys) if "" in own else self.within(own)

    def matching(self, pattern: str | re.Pattern[str]) -> set[str]:
        """Parameters whose name, or the name of a module around them, matches."""
        if isinstance(pattern, str):
            found = {name for name in self._keys if _matches(name, pattern)}
            if not found and IS_REGULAR.search(pattern):
                found = {name for name in self._keys if _is_found(pattern, name)}
        elif isinstance(pattern, re.Pattern):
            found = {name for name in self._keys if pattern.search(name)}
        else:
            raise ConfigurationError(f"patterns={pattern!r}; expected names, or patterns of names.")
        if not found:
            word = pattern if isinstance(pattern, str) else pattern.pattern
            raise ConfigurationError(
                f"patterns: {word!r} matches nothing.{nearest(word, names_of(self._model))} "
                f"Parameters: {listed(self._keys)}."
            )
        return found

    def required(self, argument: str, found: set[str]) -> set[str]:
        """``found``, which must hold something."""
        if not found - self.untrainable:
            raise ConfigurationError(
                f"{argument}=True, but {type(self._model).__name__} has none that can train. "
                f"Parameters: {listed(self._keys)}."
            )
        return found

    def unfreeze(self, names: Iterable[str]) -> None:
        """Make parameters trainable."""
        for name in names:
            module, key = self._keys[name]
            module.unfreeze(recurse=False, keys=[key])


def _is_untrainable(module: nn.Module, key: str) -> bool:
    if is_quantized(module) and key != "bias":
        return True
    is_statistic = key.startswith("running_")
    arrays = [leaf for _, leaf in leaves(module[key]) if isinstance(leaf, mx.array)]
    return is_statistic or not all(mx.issubdtype(a.dtype, mx.inexact) for a in arrays)


def _has_name(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__[:-1])


def _matches(name: str, pattern: str) -> bool:
    """Whether a run of whole components of a dotted name matches a shell pattern."""
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    return any(
        fnmatch.fnmatchcase(".".join(parts[start:end]), pattern)
        for start in range(len(parts))
        for end in ends[start:]
    )


def _is_found(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _last(blocks: Blocks, last_layers: int) -> list[str]:
    count = len(blocks.modules)
    if natural("last_layers", last_layers, 1) > count:
        raise ConfigurationError(
            f"last_layers={last_layers}, but {blocks.path} has {count} blocks; expected 1 to "
            f"{count}."
        )
    return [blocks.name(index) for index in range(count - last_layers, count)]


def _head(model: nn.Module, blocks: Blocks | None) -> str:
    found = find_head(model, blocks)
    if found is None:
        tied = find_tied(model)
        because = f"its output is tied to the embedding {tied}: use patterns=[{tied!r}]"
        raise ConfigurationError(
            f"head=True, but {type(model).__name__} has no output projection of its own; "
            + (because if tied else f"its modules are {listed(names_of(model))}")
            + ", or leave head out."
        )
    name, module = found
    if is_quantized(module):
        raise ConfigurationError(
            f"The head {name} is quantized and cannot train. Leave it out with head=False, or "
            f"adapt it: apply_lora(model, targets=[{name!r}])."
        )
    return name
