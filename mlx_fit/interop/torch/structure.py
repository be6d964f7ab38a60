"""Which torch name belongs to each layer and array of an MLX model of the same structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import named_arrays
from mlx_fit.errors import ConfigurationError
from mlx_fit.interop.torch.slots import (
    RECURRENT,
    Slot,
    attention_slots,
    joined,
    layer_slots,
    recurrent_slots,
)

# What PyTorch calls the parts of layers that both libraries have.
_PARTS: list[tuple[type[nn.Module], dict[str, str]]] = [
    (nn.Sequential, {"layers": ""}),
    (
        nn.TransformerEncoderLayer,
        {"attention": "self_attn", "ln1": "norm1", "ln2": "norm2", "dropout2": "dropout"},
    ),
    (
        nn.TransformerDecoderLayer,
        {
            "self_attention": "self_attn",
            "cross_attention": "multihead_attn",
            "ln1": "norm1",
            "ln2": "norm2",
            "ln3": "norm3",
            "dropout3": "dropout",
        },
    ),
    (nn.TransformerEncoder, {"ln": "norm"}),
    (nn.TransformerDecoder, {"ln": "norm"}),
]


class Structure:
    """The layers of an MLX model with their torch names.

    Args:
        model: the model.
        names: the names on the torch side, where known: they decide between equally good ones.

    Attributes:
        layers: MLX name of each module -> its torch name.
        slots: how each array is made of tensors.

    Raises:
        ConfigurationError: a layer is quantized.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = ()) -> None:
        self._names = frozenset(names)
        self._beginnings = _beginnings(self._names)
        self.layers: dict[str, str] = {}
        self._suffixes: dict[str, str] = {}
        modules: dict[str, nn.Module] = {}
        for path, prefix, module in self._walk(model, "", ""):
            _refuse_quantized(path, module)
            self.layers[path], modules[path] = prefix, module
        self.slots = list(self._plan(model, modules))
        self._part_stacks()

    def _walk(self, module: nn.Module, path: str, prefix: str) -> Iterator[Any]:
        yield path, prefix, module
        parts = next((parts for kind, parts in _PARTS if isinstance(module, kind)), {})
        for key, child in module.children().items():
            part = parts.get(key, key)
            if joined(prefix, key) in self._beginnings:
                part = key  # the torch model has this very name
            yield from self._walk_child(child, joined(path, key), joined(prefix, part))

    def _walk_child(self, child: Any, path: str, prefix: str) -> Iterator[Any]:
        if isinstance(child, nn.Module):
            yield from self._walk(child, path, prefix)
        elif isinstance(child, dict):
            for key, value in child.items():
                yield from self._walk_child(value, joined(path, key), joined(prefix, key))
        elif isinstance(child, list):
            yield from self._walk_list(child, path, prefix)

    def _walk_list(self, children: list[Any], path: str, prefix: str) -> Iterator[Any]:
        suffixes = self._stack_suffixes(children, prefix)
        for number, value in enumerate(children):
            key = str(number)
            if suffixes:
                self._suffixes[f"{path}.{key}"] = suffixes[number]
                yield f"{path}.{key}", prefix, value
            else:
                yield from self._walk_child(value, f"{path}.{key}", joined(prefix, key))

    def _stack_suffixes(self, children: list[Any], prefix: str) -> list[str]:
        """Suffixes of a list of recurrent layers that is one layer of several in PyTorch."""
        if not children or not all(isinstance(child, RECURRENT) for child in children):
            return []
        if self._names:
            if joined(prefix, "weight_ih_l0") not in self._names:
                return []
        elif not _is_stack(children):
            return []
        if joined(prefix, "weight_ih_l0_reverse") in self._names:
            return [f"l{n // 2}" + ("_reverse" if n % 2 else "") for n in range(len(children))]
        return [f"l{n}" for n in range(len(children))]

    def _part_stacks(self) -> None:
        """Of layers that are one in PyTorch only the last one's outputs are outputs there."""
        stacks: dict[str, list[str]] = {}
        for path in self._suffixes:
            stacks.setdefault(self.layers[path], []).append(path)
        for prefix, paths in stacks.items():
            is_reversible = any(self._suffixes[path].endswith("_reverse") for path in paths)
            for path in paths if is_reversible else paths[:-1]:
                self.layers[path] = joined(prefix, self._suffixes[path])

    def _plan(self, model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Slot]:
        attention = [
            p for p, module in modules.items() if isinstance(module, nn.MultiHeadAttention)
        ]
        owned: dict[str, dict[str, mx.array]] = {}
        for name, array in named_arrays(model.parameters()):
            owner = _owner(name, modules)
            for path in attention:  # an attention layer owns what its projections hold
                if owner.startswith(f"{path}." if path else ""):
                    owner = path
            owned.setdefault(owner, {})[name[len(owner) :].removeprefix(".")] = array
        for path, own in owned.items():
            module, prefix = modules[path], self.layers[path]
            if isinstance(module, nn.MultiHeadAttention):
                yield from attention_slots(own, path, prefix, self._names.__contains__)
            elif isinstance(module, RECURRENT):
                suffix = self._suffixes.get(path, "l0")
                yield from recurrent_slots(module, own, path, prefix, suffix)
            else:
                yield from layer_slots(module, own, path, prefix)


def _owner(name: str, modules: dict[str, nn.Module]) -> str:
    owner = name
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner


def _is_stack(layers: list[Any]) -> bool:
    """Whether each layer takes the outputs of the one before, as in PyTorch's ``num_layers``."""
    inputs = [next(w for key, w in layer.items() if key in ("Wx", "Wxh")) for layer in layers]
    sizes = {(type(layer), layer.hidden_size) for layer in layers}
    return len(sizes) == 1 and all(w.shape[1] == layers[0].hidden_size for w in inputs[1:])


def _beginnings(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return found


def _refuse_quantized(path: str, module: nn.Module) -> None:
    if type(module).__name__.startswith(("Quantized", "QQ")):
        raise ConfigurationError(
            f"{path} is a {type(module).__name__}, which has no counterpart in PyTorch. Load the "
            "weights first and quantize then (mlx.nn.quantize); to export, dequantize."
        )
