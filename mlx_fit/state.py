"""Everything that a run goes on from; and weights in one file, whole or not at all."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays, named_buffers
from mlx_fit.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWriteError,
    NonFiniteLossError,
)
from mlx_fit.protocols import Run


@dataclass
class TrainState:
    """Everything that a run goes on from.

    Attributes:
        trainer: what ``Trainer.state_dict`` gives: weights, optimizer state, loss scale, random
            key, counters, the seed of the order.
        trainable: names of the parameters that were trained.
        position: where inside a fit it was taken, None outside.
        window: gradients of an open accumulation window; empty between windows.
        sums: what the epoch has added up, None between epochs.
        callbacks: name -> state.
        history: the curves so far, None before the first fit.
        arguments: the trainer's and the fit's arguments, as plain values.
        values: the newest values in the logs, by which the best checkpoint is chosen.
        versions: of what decides the bits; filled in by reading.
    """

    trainer: dict[str, Any]
    trainable: list[str] = field(default_factory=list)
    position: dict[str, Any] | None = None
    window: dict[str, mx.array] = field(default_factory=dict)
    sums: dict[str, Any] | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class PartialOptimizer(ABC):
    """An optimizer of which every rank holds a part. Its methods here are collective."""

    @abstractmethod
    def whole_state(self) -> dict[str, mx.array]:
        """The state as if it had not been spread, by name."""

    @abstractmethod
    def load_whole_state(self, arrays: Mapping[str, mx.array]) -> None:
        """Take this rank's part of a whole state."""


def optimizer_arrays(optimizer: Any) -> dict[str, mx.array]:
    """The whole state of an optimizer by name."""
    if isinstance(optimizer, PartialOptimizer):
        return optimizer.whole_state()
    return {} if optimizer is None else dict(named_arrays(optimizer.state))


def put_optimizer(optimizer: Any, arrays: Mapping[str, mx.array]) -> None:
    """Put arrays that were checked into an optimizer's state, in place."""
    if isinstance(optimizer, PartialOptimizer):
        optimizer.load_whole_state(arrays)
    else:
        assign(optimizer.state, arrays.items())


def without_arrays(state: TrainState) -> TrainState:
    """All of a state but weights, optimizer state and sums, to be kept while training goes on."""
    return replace(state, trainer={}, window={}, sums=None)


def judged_weights(run: Run) -> dict[str, mx.array]:
    """What is evaluated and saved, by name: the weights, or a callback's averages of them."""
    averages = {} if run.averages is None else run.averages.averages()
    return dict(named_arrays(run.model.parameters())) | averages


def save_weights(path: Path, run: Run) -> None:
    """Write all parameters, or a callback's averages, to a ``.safetensors`` file, atomically.

    Args:
        path: the file.
        run: whose weights; they and the optimizer's state are looked at for NaN and infinity.

    Raises:
        NonFiniteLossError: weights or optimizer state hold NaN or infinity; nothing is written.
        CheckpointWriteError: writing failed; an earlier file is untouched.
    """
    if bad := non_finite_names(run.model, run.optimizer):
        raise NonFiniteLossError(
            f"Not saved to {path}: these arrays hold NaN or infinity: {', '.join(bad[:5])}"
            f"{', ...' if len(bad) > 5 else ''}. Go on from a file saved before.",
            step=run.step,
            epoch=run.epoch,
            value=float("nan"),
        )
    write_arrays(path, judged_weights(run))


def non_finite_names(model: nn.Module, optimizer: Any) -> list[str]:
    """Names of trainable weights and optimizer arrays that hold NaN or infinity. Synchronises."""
    named = named_arrays(model.trainable_parameters())
    if optimizer is not None:
        named += [(f"optimizer.{name}", value) for name, value in named_arrays(optimizer.state)]
    floats = [(name, value) for name, value in named if mx.issubdtype(value.dtype, mx.inexact)]
    flags = [mx.isfinite(value).all() for _, value in floats]
    mx.eval(flags)
    return [name for (name, _), flag in zip(floats, flags, strict=True) if not flag.item()]


def write_arrays(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Write a ``.safetensors`` file: staged beside its target, synced to disk, then renamed.

    Raises:
        CheckpointWriteError: it could not be written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not *.safetensors: what a killed process leaves must not be taken for weights.
        staged = path.with_name(f".tmp-{os.urandom(16).hex()}")
        try:
            with staged.open("xb") as file:
                mx.save_safetensors(file, dict(arrays), metadata={"format": "mlx"})
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
            sync_folder(path.parent)
        finally:
            staged.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointWriteError(f"{path} could not be written: {error}", path=path) from error


def read_arrays(path: Path) -> dict[str, mx.array]:
    """Read a ``.safetensors`` file into memory.

    Raises:
        CheckpointError: the file is missing or not readable as safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is not a file.", path=path)
    try:
        arrays = mx.load(str(path), format="safetensors")
        mx.eval(arrays)  # mx.load is lazy; the file may be replaced later
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}", path=path
        ) from error
    assert isinstance(arrays, dict)
    return arrays


def check_parameters(
    model: nn.Module, arrays: Mapping[str, mx.array], *, strict: bool, source: str
) -> None:
    """Raise unless arrays fit a model by name and shape; see :func:`load_parameters`."""
    mine = dict(named_arrays(model.parameters()))
    missing = sorted(mine.keys() - arrays.keys()) if strict else []
    extra = sorted(arrays.keys() - mine.keys()) if strict else []
    misshapen = {
        name: (tuple(arrays[name].shape), tuple(mine[name].shape))
        for name in mine.keys() & arrays.keys()
        if arrays[name].shape != mine[name].shape
    }
    if missing or extra or misshapen:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"extra {', '.join(extra)}"] if extra else []
        parts += [
            f"{name} has shape {found}, the model expects {expected}"
            for name, (found, expected) in sorted(misshapen.items())
        ]
        raise CheckpointMismatchError(
            f"{source} does not fit the model: {'; '.join(parts)}. Build the model as it was when "
            "it was saved"
            + (", or pass strict=False to load what fits by name." if strict else "."),
            missing=missing,
            extra=extra,
            misshapen=misshapen,
        )


def load_parameters(
    model: nn.Module, arrays: Mapping[str, mx.array], *, strict: bool, source: str
) -> None:
    """Put arrays into a model by name: all of them, or none if something does not fit.

    Args:
        model: the model.
        arrays: name -> array, as ``named_arrays(model.parameters())`` names them.
        strict: whether missing and extra names are errors. Shapes must agree in any case.
        source: where they come from, for the message.

    Raises:
        CheckpointMismatchError: lists the missing, extra and misshapen names.
    """
    check_parameters(model, arrays, strict=strict, source=source)
    mine = dict(named_arrays(model.parameters()))
    fitting = [(n, a.astype(mine[n].dtype)) for n, a in arrays.items() if n in mine]
    assign(model, fitting)


def check_buffers(model: nn.Module, arrays: Mapping[str, mx.array], source: str) -> None:
    """Warn of saved buffers that :func:`put_buffers` will leave out."""
    fitting = {name for name, *_ in _buffer_places(model, arrays)}
    if others := sorted(arrays.keys() - fitting):
        warnings.warn(
            f"{source} holds {', '.join(others)}, which the model does not have, or in another "
            "shape: they stay as they are. Build the model as it was when it was saved.",
            stacklevel=2,
        )


def put_buffers(model: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Put saved buffers into a model: those of the same shape, and those it has yet to make."""
    for name, module, key in _buffer_places(model, arrays):
        if module is None:
            assign(model, [(name, arrays[name])])
        else:
            setattr(module, key, arrays[name])  # past a None that the layer was made with


def _buffer_places(
    model: nn.Module, arrays: Mapping[str, mx.array]
) -> list[tuple[str, nn.Module | None, str]]:
    """Name, and where the model has no such array yet its module and key, of what can be put."""
    mine, modules = named_buffers(model), dict(model.named_modules())
    found: list[tuple[str, nn.Module | None, str]] = []
    for name, array in arrays.items():
        path, _, key = name.rpartition(".")
        if name in mine and mine[name].shape == array.shape:
            found.append((name, None, key))
        elif name in mine or path not in modules or not key.startswith("_"):
            continue
        elif getattr(modules[path], key, None) is None:  # no method or setting of the layer
            found.append((name, modules[path], key))
    return found


def load_optimizer(optimizer: Any, arrays: Mapping[str, mx.array]) -> None:
    """Put arrays into an initialised optimizer's state, in place: all of them, or none.

    Raises:
        CheckpointMismatchError: the state is another optimizer's, or another model's.
    """
    check_optimizer(optimizer, arrays)
    put_optimizer(optimizer, arrays)


def check_optimizer(optimizer: Any, arrays: Mapping[str, mx.array]) -> None:
    """Raise unless arrays fit an initialised optimizer's state by name and shape."""
    mine = optimizer_arrays(optimizer)
    missing, extra = sorted(mine.keys() - arrays.keys()), sorted(arrays.keys() - mine.keys())
    misshapen = {
        name: (tuple(arrays[name].shape), tuple(mine[name].shape))
        for name in mine.keys() & arrays.keys()
        if arrays[name].shape != mine[name].shape
    }
    if missing or extra or misshapen:
        raise CheckpointMismatchError(
            f"The optimizer's state does not fit: missing {', '.join(missing) or 'nothing'}; extra "
            f"{', '.join(extra) or 'nothing'}; other shapes {', '.join(misshapen) or 'none'}. Use "
            "the optimizer, and freeze what was frozen, when it was saved.",
            missing=missing,
            extra=extra,
            misshapen=misshapen,
        )


def sync_folder(path: Path) -> None:
    """Make names that were created or renamed in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
