"""Weights from PyTorch into an MLX model of the same structure, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays
from mlx_fit.checks import boolean
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.interop.torch.mismatch import Mismatch
from mlx_fit.interop.torch.parametrized import folded
from mlx_fit.interop.torch.report import LoadedArray, LoadReport
from mlx_fit.interop.torch.slots import Slot
from mlx_fit.interop.torch.sources import TORCH_FILES, Rename, read_state, renamed
from mlx_fit.interop.torch.structure import Structure
from mlx_fit.interop.torch.tensors import require_torch, to_tensor

_COUNTER = "num_batches_tracked"  # PyTorch's count of batches; MLX's norms do not count


def load_weights(
    model: nn.Module,
    source: Any,
    *,
    rename: Rename = None,
    strict: bool = True,
    dtype: mx.Dtype | None = None,
) -> LoadReport:
    """Load PyTorch weights into an MLX model of the same structure.

    Layers are found by their names: those of the MLX attributes, with the numbers of
    ``nn.Sequential`` as in PyTorch (``0.weight`` for ``layers.0.weight``) and PyTorch's names
    inside of MLX's transformer layers. The layout is converted by the type of the layer:
    convolutions to channels last, packed attention projections split, the two biases of recurrent
    layers added. A list of recurrent layers takes a PyTorch layer with ``num_layers``; with
    ``bidirectional`` it is ``[forward 0, backward 0, forward 1, ...]``. Weights under
    ``weight_norm`` and ``spectral_norm`` become what the module uses in evaluation.

    Either everything is loaded or nothing.

    Args:
        model: the model to fill, in place.
        source: a ``state_dict``, a ``torch.nn.Module``, or the path of a ``.safetensors``, ``.pt``,
            ``.pth``, ``.bin`` or ``.ckpt`` file. Files of torch are read with
            ``torch.load(weights_only=True)`` and in no other way.
        rename: for other names: a table from torch names, or their dotted beginnings, to those
            expected here, None to drop; or a function of a torch name.
        strict: False leaves arrays that are missing as they are, and ignores extra tensors. Shapes
            must agree all the same.
        dtype: of the floating-point arrays; None keeps the source's (float64 becomes float32).

    Returns:
        The table of what was loaded.

    Raises:
        CheckpointMismatchError: names or shapes do not fit; lists each with what is nearest.
        ConfigurationError: an argument cannot work, or a layer is quantized.
        DataError: the file cannot be read, or holds integers where the model has floats.

    Example:
        >>> import mlx.nn as nn, numpy as np
        >>> from mlx_fit.interop.torch import load_weights
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU())
        >>> state = {"0.weight": np.ones((8, 3, 5, 5)), "0.bias": np.zeros(8)}
        >>> report = load_weights(model, state)
        >>> report.loaded[0].source_shape, report.loaded[0].shape
        ((8, 3, 5, 5), (8, 5, 5, 3))
    """
    _check_model(model)
    boolean("strict", strict)
    if dtype is not None and not (
        isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating)
    ):
        raise ConfigurationError(f"dtype={dtype!r}; expected a floating one, such as mx.float32.")
    own = [name for name, _ in named_arrays(model.parameters())]
    given = folded(read_state(source), {name.rpartition(".")[2] for name in own})
    names = renamed(given, rename)
    state = {name: given[old] for name, old in names.items()}
    slots = Structure(model, state).slots
    extra, tied = _unused(slots, state)
    twins = _tied_in_model(model, slots, state)
    mismatch = Mismatch([s for s in slots if s.names[0] not in twins], state, extra)
    if mismatch.misshapen or (strict and mismatch):
        raise mismatch.error("nothing was loaded")
    skipped = {name for slot in mismatch.missing for name in slot.names}
    taken = [slot for slot in slots if slot.names[0] not in skipped | twins.keys()]
    arrays = _read(taken, state, dtype)
    arrays |= {name: arrays[twin] for name, twin in twins.items() if twin in arrays}
    _check_kinds(model, arrays)
    mx.eval(list(arrays.values()))
    assign(model, arrays.items())
    dropped = [old for old in given if old not in set(names.values())]
    counters = [name for name in state if name.endswith(_COUNTER)]
    return LoadReport(
        [_row(slot, index, arrays, state) for slot in taken for index in range(len(slot.names))],
        [names[name] for name in tied],
        dropped + [names[name] for name in [*counters, *extra]],
        sorted(skipped),
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}; expected an mlx.nn.Module.")


def _unused(slots: list[Slot], state: Mapping[str, mx.array]) -> tuple[list[str], list[str]]:
    """Tensors that no slot takes: those that are needed nowhere, and those tied to one taken."""
    used = {source for slot in slots for source in slot.sources if source in state}
    extra: list[str] = []
    tied: list[str] = []
    for name, array in state.items():
        if name in used or name.endswith(_COUNTER):
            continue
        is_tied = any(_is_same(array, state[other]) for other in used)
        (tied if is_tied else extra).append(name)
    return extra, tied


def _is_same(array: mx.array, other: mx.array) -> bool:
    if array is other:
        return True
    # A file may hold a tied matrix twice. Vectors agree by accident: zeros and ones.
    alike = array.ndim > 1 and array.shape == other.shape and array.dtype == other.dtype
    return alike and bool(mx.array_equal(array, other))


def _tied_in_model(
    model: nn.Module, slots: list[Slot], state: Mapping[str, mx.array]
) -> dict[str, str]:
    """Arrays that the source lacks and that are the same object as one that it has."""
    arrays = dict(named_arrays(model.parameters()))
    owners = {
        id(arrays[slot.names[0]]): slot.names[0]
        for slot in slots
        if all(source in state for source in slot.sources)
    }
    return {
        name: owners[id(arrays[name])]
        for slot in slots
        for name in slot.names
        if any(source not in state for source in slot.sources) and id(arrays[name]) in owners
    }


def _read(
    slots: list[Slot], state: Mapping[str, mx.array], dtype: mx.Dtype | None
) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    known: dict[Any, list[mx.array]] = {}
    for slot in slots:
        tensors = [state[source] for source in slot.sources]
        # Tied tensors of one layout stay one array.
        key = (tuple(map(id, tensors)), slot.note)
        if key not in known:
            known[key] = [_cast(array, dtype) for array in slot.read(tensors)]
        arrays |= zip(slot.names, known[key], strict=True)
    return arrays


def _check_kinds(model: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Raise where integers or complex numbers would take the place of floats."""
    for name, old in named_arrays(model.parameters()):
        new = arrays.get(name, old)
        if mx.issubdtype(old.dtype, mx.floating) and not mx.issubdtype(new.dtype, mx.floating):
            raise DataError(
                f"{name!r} is {_dtype(old)} in the model and {_dtype(new)} in the weights; nothing "
                "was loaded. Quantized weights must be dequantized first.",
                field=name,
            )


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    if mx.issubdtype(array.dtype, mx.floating):
        if dtype is None:
            dtype = mx.float32 if array.dtype == mx.float64 else array.dtype
        return array.astype(dtype)
    return array


def _row(
    slot: Slot, index: int, arrays: Mapping[str, mx.array], state: Mapping[str, mx.array]
) -> LoadedArray:
    array = arrays[slot.names[index]]
    return LoadedArray(
        slot.names[index],
        tuple(array.shape),
        _dtype(array),
        " + ".join(slot.sources),
        tuple(state[slot.sources[0]].shape),
        slot.note,
    )


def export_weights(
    model: nn.Module,
    path: str | Path | None = None,
    *,
    rename: Rename = None,
    like: Any = None,
) -> dict[str, Any] | Path:
    """The weights of an MLX model by PyTorch's names and in its layouts.

    What :func:`load_weights` loaded comes back bit for bit. Of recurrent layers that is true of the
    sum of the two biases; with ``like`` also of the biases one by one, unless they were trained.

    Args:
        model: the model.
        path: a ``.safetensors`` file, or a ``.pt``, ``.pth`` or ``.bin`` one, to write; None
            returns tensors. Parent folders are made.
        rename: the table that was given to :func:`load_weights`; it is read backwards. With
            ``like`` also the function.
        like: the ``state_dict``, module or file that the result shall be like: it has the same
            names, tied tensors and the arrays that MLX has no use for.

    Returns:
        A ``state_dict`` of torch tensors, or the path that was written. A ``.safetensors`` file is
        written without torch.

    Raises:
        CheckpointMismatchError: the model does not fit ``like``.
        ConfigurationError: an argument cannot work, or a layer is quantized.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_fit.interop.torch import export_weights
        >>> state = export_weights(nn.Sequential(nn.Conv2d(3, 8, 5)))
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'0.weight': (8, 3, 5, 5), '0.bias': (8,)}
    """
    _check_model(model)
    path = None if path is None else _checked_path(Path(path))
    arrays = _exported(model, rename) if like is None else _exported_like(model, rename, like)
    mx.eval(list(arrays.values()))
    if path is None:
        return _tensors(arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".safetensors":
        mx.save_safetensors(str(part), arrays, metadata={"format": "pt"})
    else:
        torch = require_torch(f"Writing {path.name}")
        torch.save(_tensors(arrays), part)
    os.replace(part, path)
    return path


def _tensors(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    """Tensors, where arrays that are one stay one."""
    known = {id(array): to_tensor(array) for array in arrays.values()}
    return {name: known[id(array)] for name, array in arrays.items()}


def _checked_path(path: Path) -> Path:
    if path.suffix not in (".safetensors", *TORCH_FILES):
        raise ConfigurationError(
            f"path {str(path)!r} ends in {path.suffix!r}; expected .safetensors, which needs no "
            f"torch to read, or one of {', '.join(TORCH_FILES)}."
        )
    return path


def _written(model: nn.Module, slots: list[Slot]) -> dict[str, mx.array]:
    own = dict(named_arrays(model.parameters()))
    arrays: dict[str, mx.array] = {}
    known: dict[Any, list[mx.array]] = {}
    for slot in slots:
        key = (tuple(id(own[name]) for name in slot.names), slot.note)
        if key not in known:
            known[key] = slot.write([own[name] for name in slot.names])
        arrays |= zip(slot.sources, known[key], strict=True)
    return arrays


def _exported(model: nn.Module, rename: Rename) -> dict[str, mx.array]:
    if callable(rename):
        raise ConfigurationError(
            "rename is a function, which cannot be read backwards; give like= (the torch model or "
            "its state_dict) with it, or a table."
        )
    if rename is not None and not isinstance(rename, Mapping):
        raise ConfigurationError(f"rename is a {type(rename).__name__}; expected a table.")
    table = {new: old for old, new in (rename or {}).items() if new is not None}
    arrays = _written(model, Structure(model, _expected_names(model, table)).slots)
    names = renamed(arrays, table or None)
    return {new: arrays[old] for new, old in names.items()}


def _expected_names(model: nn.Module, table: Mapping[str, str]) -> list[str]:
    """Names that the table asks for, in place of those the structure would choose."""
    plain = {source for slot in Structure(model).slots for source in slot.sources}
    own = [name for name, _ in named_arrays(model.parameters())]
    fits = all(any(_begins_with(name, key) for name in plain) for key in table)
    return [] if fits else own


def _begins_with(name: str, key: str) -> bool:
    return not key or name == key or name.startswith(f"{key}.")


def _exported_like(model: nn.Module, rename: Rename, like: Any) -> dict[str, mx.array]:
    given = read_state(like)
    names = renamed(given, rename)
    state = {name: given[old] for name, old in names.items()}
    slots = Structure(model, state).slots
    _, tied = _unused(slots, state)
    mismatch = Mismatch(slots, state, [])
    if mismatch:
        raise mismatch.error("nothing was exported")
    arrays = _written(model, slots)
    own = dict(named_arrays(model.parameters()))
    for slot in slots:
        tensors = [state[source] for source in slot.sources]
        if _are_equal(slot.read(tensors), [own[name] for name in slot.names]):
            arrays |= zip(slot.sources, tensors, strict=True)  # never trained: as they were
    for name in tied:
        twin = next(other for other in arrays if _is_same(state[name], state[other]))
        arrays[name] = arrays[twin]
    exported = {old: arrays.get(name, state[name]) for name, old in names.items()}
    return given | exported


def _are_equal(arrays: list[mx.array], others: list[mx.array]) -> bool:
    return all(
        a.dtype == b.dtype and bool(mx.array_equal(a, b))
        for a, b in zip(arrays, others, strict=True)
    )
