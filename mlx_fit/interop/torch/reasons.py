"""Why a layer of one library may compute something else than its twin of the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit.interop.torch.differences import Difference, Tolerance, factor, same_numbers
from mlx_fit.interop.torch.recording import Call
from mlx_fit.interop.torch.slots import CONVOLUTIONS, TRANSPOSED

_ABSENT = object()
# What is compared: a word, PyTorch's attributes and MLX's, of which the first that exists counts.
_SETTINGS = [
    ("epsilon", ("eps",), ("eps",)),
    ("stride", ("stride",), ("stride", "_stride")),
    ("padding", ("padding",), ("padding", "_padding")),
    ("dilation", ("dilation",), ("dilation",)),
    ("groups", ("groups",), ("groups",)),
    ("output padding", ("output_padding",), ("output_padding",)),
    ("kernel size", ("kernel_size",), ("_kernel_size",)),
    ("number of groups", ("num_groups",), ("num_groups",)),
    ("number of heads", ("num_heads",), ("num_heads",)),
    ("negative slope", ("negative_slope",), ("_negative_slope",)),
    ("alpha", ("alpha",), ("_alpha",)),
    ("order of norm and attention", ("norm_first",), ("norm_first",)),
    ("scale factor", ("scale_factor",), ("scale_factor",)),
    ("mode", ("mode",), ("mode",)),
]
_MODES = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}
_SAME_KINDS = {"identity": "dropout", "swish": "silu"}


def layer_reasons(
    torch_call: Call, mlx_call: Call, apart: Difference, tolerance: Tolerance
) -> list[str]:
    """What differs between two layers that got the same and gave something else."""
    theirs, ours = torch_call.layer, mlx_call.layer
    reasons = [*_kinds(theirs, ours), *_settings(theirs, ours), *_special(theirs, ours)]
    if not reasons:
        reasons += value_reasons(apart, mlx_call.output, tolerance)
    return reasons


def value_reasons(apart: Difference, got: np.ndarray | None, tolerance: Tolerance) -> list[str]:
    """What the values themselves tell."""
    if got is None:
        return []
    if apart.moved is None:
        expected = tuple(apart.expected.shape)
        reason = f"shape: PyTorch gives {expected}, MLX {tuple(got.shape)}"
        if sorted(expected) == sorted(got.shape):
            reason += "; layout: MLX's layers keep channels last"
        return [reason]
    if same_numbers(apart.expected, got, tolerance):
        return ["layout: the same numbers in another order"]
    ratio = factor(apart.expected, got)
    if ratio is not None:
        return [f"MLX's values are {ratio:.6g} times PyTorch's: a reduction or a scale differs"]
    return []


def input_reasons(theirs: np.ndarray, ours: np.ndarray, tolerance: Tolerance) -> list[str]:
    """Why two layers may have been given something else, although all before them agree."""
    if same_numbers(theirs, ours, tolerance):
        return [
            "layout: its input has the same numbers in another order. Flattening channels last "
            "orders features by (height, width, channel), PyTorch by (channel, height, width): "
            "transpose before the flatten (x.transpose(0, 3, 1, 2).reshape(...)), or reorder the "
            "columns of this layer's weight"
        ]
    return [
        "its input differs already, while every layer before it agrees: look at what is computed "
        "between them outside of layers (activations, GELU variant, padding, masks, reductions)"
    ]


def _kinds(theirs: Any, ours: Any) -> list[str]:
    known = type(theirs).__module__.startswith("torch.nn") and isinstance(
        ours, tuple(v for v in vars(nn).values() if isinstance(v, type))
    )
    kinds = [_kind(theirs), _kind(ours)]
    own_class = not type(ours).__module__.startswith("mlx.nn")
    if not known or own_class or kinds[0] == kinds[1] or "sequential" in kinds:
        return []
    return [f"type: PyTorch has {type(theirs).__name__} here, MLX {type(ours).__name__}"]


def _kind(layer: Any) -> str:
    kind = re.sub(r"(\dd)?$", "", type(layer).__name__).lower()
    return _SAME_KINDS.get(kind, kind)


def _settings(theirs: Any, ours: Any) -> Iterable[str]:
    for word, their_names, our_names in _SETTINGS:
        his, mine = _first(theirs, their_names), _first(ours, our_names)
        if his is _ABSENT or mine is _ABSENT or his is None or callable(mine):
            continue
        if not _agree(his, mine):
            yield f"{word}: PyTorch {_plain(his)}, MLX {_plain(mine)}"


def _first(layer: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), _ABSENT)


def _agree(his: Any, mine: Any) -> bool:
    if isinstance(his, str) or isinstance(mine, str):
        return _MODES.get(his, his) == mine
    a, b = np.atleast_1d(_plain(his)), np.atleast_1d(_plain(mine))
    return (
        bool(np.allclose(a, b, rtol=1e-9, atol=0))
        if a.size == 1 or b.size == 1
        else bool(a.shape == b.shape and np.allclose(a, b))
    )


def _plain(value: Any) -> Any:
    """``[(1, 1), (2, 2)]``, the paddings of MLX's pools, as ``(1, 2)``."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        return tuple(pair[0] for pair in value)
    return tuple(value) if isinstance(value, list) else value


def _special(theirs: Any, ours: Any) -> Iterable[str]:
    for kind, reasons in _SPECIAL:
        if isinstance(ours, kind):
            yield from reasons(theirs, ours)


def _gelu(theirs: Any, ours: Any) -> Iterable[str]:
    names = {"precise": "tanh"}
    his, mine = getattr(theirs, "approximate", None), names.get(ours._approx, ours._approx)
    if his is not None and his != mine:
        right = {"none": "none", "tanh": "precise"}.get(his, his)
        yield f"GELU variant: PyTorch approximate={his!r}, MLX {mine!r}; use nn.GELU({right!r})"


def _convolution(theirs: Any, ours: Any) -> Iterable[str]:
    mode = getattr(theirs, "padding_mode", "zeros")
    if mode != "zeros":
        yield f"padding: PyTorch pads in mode {mode!r}, MLX with zeros; pad with mx.pad before"


def _group_norm(theirs: Any, ours: Any) -> Iterable[str]:
    if not ours.pytorch_compatible:
        yield "grouping: use nn.GroupNorm(..., pytorch_compatible=True), which groups as PyTorch"


def _batch_norm(theirs: Any, ours: Any) -> Iterable[str]:
    his, mine = getattr(theirs, "momentum", None), ours.momentum
    if his is None:
        yield "momentum: PyTorch averages all batches (momentum=None), MLX cannot"
    elif not np.isclose(his, mine):
        hint = "; the convention is reversed (Keras's)" if np.isclose(his + mine, 1) else ""
        yield f"momentum: PyTorch {his}, MLX {mine}{hint}; both mean the share of the new batch"
    if theirs.training != ours.training:
        yield f"mode: training is {theirs.training} in PyTorch, {ours.training} in MLX"


def _pool(theirs: Any, ours: Any) -> Iterable[str]:
    if getattr(theirs, "ceil_mode", False):
        yield "padding: PyTorch has ceil_mode=True, MLX drops what does not fill a window"
    padded = np.any(np.asarray(getattr(theirs, "padding", 0)) > 0)
    if padded and not getattr(theirs, "count_include_pad", True):
        yield "padding: PyTorch leaves padding out of averages (count_include_pad=False), MLX not"


def _softmax(theirs: Any, ours: Any) -> Iterable[str]:
    dim = getattr(theirs, "dim", -1)
    if dim != -1:
        yield f"axis: PyTorch takes the softmax over dim={dim}, MLX over the last axis"


_Reasons = Callable[[Any, Any], Iterable[str]]
_SPECIAL: list[tuple[Any, _Reasons]] = [
    (nn.GELU, _gelu),
    ((*CONVOLUTIONS, *TRANSPOSED), _convolution),
    (nn.GroupNorm, _group_norm),
    (nn.BatchNorm, _batch_norm),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _pool),
    ((nn.Softmax, nn.LogSoftmax), _softmax),
]


def optimizer_reasons(theirs: Any, ours: Any) -> list[str]:
    """Where the settings of a torch optimizer and an MLX one differ in what they compute."""
    groups = list(theirs.param_groups)
    parts = list(ours.optimizers) if isinstance(ours, optim.MultiOptimizer) else [ours]
    reasons: list[str] = []
    if len(groups) != len(parts):
        reasons.append(
            f"groups: PyTorch has {len(groups)}, MLX {len(parts)}; see interop.torch.param_groups"
        )
    # Groups stand in any order: those that have a twin first, then what is left in order.
    left = []
    for group in groups[: len(parts)]:
        twin = next((n for n, p in enumerate(parts) if not _group_reasons(group, theirs, p)), None)
        if twin is None:
            left.append(group)
        else:
            del parts[twin]
    for group, part in zip(left, parts, strict=False):
        reasons += [r for r in _group_reasons(group, theirs, part) if r not in reasons]
    return reasons


def _group_reasons(group: dict[str, Any], theirs: Any, ours: Any) -> list[str]:
    reasons = [
        f"{word}: PyTorch {his!r}, MLX {mine!r}"
        for word, his, mine in _optimizer_settings(group, theirs, ours)
        if his != mine and not (_is_number(his) and _is_number(mine) and np.isclose(his, mine))
    ]
    if type(theirs).__name__.lower() != type(ours).__name__.lower():
        kinds = f"PyTorch {type(theirs).__name__}, MLX {type(ours).__name__}"
        reasons.insert(0, f"kind: {kinds}")
    return reasons


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _optimizer_settings(group: dict[str, Any], theirs: Any, ours: Any) -> Iterable[Any]:
    yield "learning rate", float(group["lr"]), float(f"{ours.learning_rate.item():.7g}")
    if type(theirs).__name__ in ("Adam", "AdamW"):
        yield "bias correction", True, getattr(ours, "bias_correction", False)
    if "betas" in group:
        yield "betas", tuple(group["betas"]), tuple(getattr(ours, "betas", ()))
    for key in ("eps", "alpha", "momentum", "dampening", "nesterov", "weight_decay"):
        if key in group:
            absent = False if key == "nesterov" else 0
            yield key.replace("_", " "), group[key], getattr(ours, key, absent)
    for key in ("amsgrad", "centered", "maximize"):
        yield key, bool(group.get(key, False)), getattr(ours, key, False)
    if type(theirs).__name__ == "Adam":
        yield "decoupled weight decay", bool(group.get("decoupled_weight_decay", False)), False
