"""How arrays of an MLX layer stand to tensors of the PyTorch layer of the same kind.

Convolutions keep channels last in MLX and first in PyTorch; PyTorch's recurrent layers have two
biases where MLX has one; its attention packs three projections. Sources: the ``torch.nn`` and
``mlx.nn`` references of ``Conv2d``, ``ConvTranspose2d``, ``LSTM``, ``GRU``, ``MultiheadAttention``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Shape = tuple[int, ...]
Arrays = list[mx.array]
Has = Callable[[str], bool]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_RECURRENT_WEIGHTS = {nn.RNN: ("Wxh", "Whh"), nn.LSTM: ("Wx", "Wh"), nn.GRU: ("Wx", "Wh")}


@dataclass(frozen=True)
class Slot:
    """Some arrays of an MLX model and the tensors that they are made of.

    Attributes:
        names, shapes: the MLX arrays.
        sources, source_shapes: the torch tensors.
        read: tensors to arrays. write: arrays to tensors.
        gradient: gradients of the tensors to gradients of the arrays.
        note: what differs, for the report.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    sources: tuple[str, ...]
    source_shapes: tuple[Shape, ...]
    read: Callable[[Arrays], Arrays]
    write: Callable[[Arrays], Arrays]
    gradient: Callable[[Arrays], Arrays]
    note: str = ""


def same(name: str, source: str, array: mx.array) -> Slot:
    """One array that is the tensor as it is."""
    return moved(name, source, array, tuple(range(array.ndim)), "")


def moved(name: str, source: str, array: mx.array, axes: Shape, note: str) -> Slot:
    """One array that is ``tensor.transpose(axes)``."""
    back = tuple(axes.index(axis) for axis in range(len(axes)))

    def read(tensors: Arrays) -> Arrays:
        return [mx.contiguous(tensors[0].transpose(axes))] if note else tensors

    def write(arrays: Arrays) -> Arrays:
        return [mx.contiguous(arrays[0].transpose(back))] if note else arrays

    shape = tuple(array.shape)
    source_shape = tuple(shape[axis] for axis in back)
    return Slot((name,), (shape,), (source,), (source_shape,), read, write, read, note)


def layer_slots(module: nn.Module, own: dict[str, mx.array], path: str, prefix: str) -> list[Slot]:
    """The slots of a layer that is neither recurrent nor attention.

    Args:
        module: the layer. own: its arrays by their names within it.
        path: its name in the MLX model. prefix: its name in the torch model.
    """
    slots = []
    for key, array in own.items():
        name, source = joined(path, key), joined(prefix, key)
        axes, note = _layout(module, array) if key == "weight" else (None, "")
        slots.append(moved(name, source, array, axes, note) if axes else same(name, source, array))
    return slots


def _layout(module: nn.Module, array: mx.array) -> tuple[Shape | None, str]:
    spatial = tuple(range(2, array.ndim))
    if isinstance(module, CONVOLUTIONS):  # (out, in, *kernel) -> (out, *kernel, in)
        return (0, *spatial, 1), "channels last"
    if isinstance(module, TRANSPOSED):  # (in, out, *kernel) -> (out, *kernel, in)
        return (1, *spatial, 0), "channels last, out first"
    if isinstance(module, nn.Bilinear):  # (out, in1, in2) -> (out, in2, in1)
        return (0, 2, 1), "inputs swapped"
    return None, ""


def joined(*parts: str) -> str:
    """Parts of a dotted name, without the empty ones."""
    return ".".join(part for part in parts if part)


# --- recurrent layers -----------------------------------------------------------------------------


def recurrent_slots(
    module: Any, own: dict[str, mx.array], path: str, prefix: str, suffix: str
) -> list[Slot]:
    """The slots of an RNN, LSTM or GRU.

    The order of the gates is the same (i, f, g, o; r, z, n). MLX adds one bias where PyTorch adds
    two, but for the GRU's candidate, whose second bias is inside the product with r.

    Args:
        suffix: PyTorch's, such as ``l0`` or ``l1_reverse``.
    """
    kind = next(kind for kind in RECURRENT if isinstance(module, kind))
    slots = [
        same(joined(path, key), joined(prefix, f"{theirs}_{suffix}"), own[key])
        for key, theirs in zip(_RECURRENT_WEIGHTS[kind], ("weight_ih", "weight_hh"), strict=True)
    ]
    sources = tuple(joined(prefix, f"{bias}_{suffix}") for bias in ("bias_ih", "bias_hh"))
    if kind is nn.GRU and "b" in own:
        slots.append(_gru_biases(own, path, sources))
    elif "bias" in own:
        slots.append(_two_biases(own["bias"], path, sources))
    return slots


def _two_biases(bias: mx.array, path: str, sources: tuple[str, ...]) -> Slot:
    shape = tuple(bias.shape)
    return Slot(
        (joined(path, "bias"),),
        (shape,),
        sources,
        (shape, shape),
        read=lambda tensors: [tensors[0] + tensors[1]],
        # -0.0 and not 0.0: only x + -0.0 is x for every x, also for -0.0.
        write=lambda arrays: [arrays[0], mx.full(shape, -0.0, arrays[0].dtype)],
        gradient=lambda tensors: tensors[:1],
        note="bias_ih + bias_hh",
    )


def _gru_biases(own: dict[str, mx.array], path: str, sources: tuple[str, ...]) -> Slot:
    size = own["bhn"].shape[0]
    shape = tuple(own["b"].shape)

    def read(tensors: Arrays) -> Arrays:
        inputs, hidden = tensors
        both = inputs[: 2 * size] + hidden[: 2 * size]
        return [mx.concatenate([both, inputs[2 * size :]]), mx.contiguous(hidden[2 * size :])]

    def write(arrays: Arrays) -> Arrays:
        nothing = mx.full((2 * size,), -0.0, arrays[0].dtype)
        return [arrays[0], mx.concatenate([nothing, arrays[1]])]

    return Slot(
        (joined(path, "b"), joined(path, "bhn")),
        (shape, (size,)),
        sources,
        (shape, shape),
        read,
        write,
        gradient=lambda tensors: [tensors[0], tensors[1][2 * size :]],
        note="bias_ih + bias_hh, the candidate's apart",
    )


# --- attention ------------------------------------------------------------------------------------

_PROJECTIONS = ("query_proj", "key_proj", "value_proj")
_SPLIT = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_slots(own: dict[str, mx.array], path: str, prefix: str, has: Has) -> list[Slot]:
    """The slots of ``nn.MultiHeadAttention``, whose projections ``torch`` packs into one tensor.

    Args:
        own: the arrays of the layer and its projections, by their names within the layer.
        has: whether the torch side has a tensor of a name; it may have the projections one by one.
    """
    weights = [own[f"{name}.weight"] for name in _PROJECTIONS]
    if has(joined(prefix, "query_proj.weight")):
        return [same(joined(path, key), joined(prefix, key), value) for key, value in own.items()]
    is_packed = len({tuple(weight.shape) for weight in weights}) == 1
    if is_packed and not has(joined(prefix, _SPLIT[0])):
        slots = [_packed("weight", weights, path, prefix)]
    else:
        slots = [
            same(joined(path, f"{name}.weight"), joined(prefix, theirs), weight)
            for name, theirs, weight in zip(_PROJECTIONS, _SPLIT, weights, strict=True)
        ]
    if "query_proj.bias" in own:
        biases = [own[f"{name}.bias"] for name in _PROJECTIONS]
        slots.append(_packed("bias", biases, path, prefix))
    for key, array in own.items():
        if key.startswith("out_proj."):
            slots.append(same(joined(path, key), joined(prefix, key), array))
    return slots


def _packed(kind: str, arrays: Arrays, path: str, prefix: str) -> Slot:
    rows = [array.shape[0] for array in arrays]
    cuts = [rows[0], rows[0] + rows[1]]

    def read(tensors: Arrays) -> Arrays:
        return [mx.contiguous(part) for part in mx.split(tensors[0], cuts)]

    return Slot(
        tuple(joined(path, name, kind) for name in _PROJECTIONS),
        tuple(tuple(array.shape) for array in arrays),
        (joined(prefix, f"in_proj_{kind}"),),
        ((sum(rows), *arrays[0].shape[1:]),),
        read,
        lambda parts: [mx.concatenate(parts)],
        read,
        note="query, key, value packed",
    )
