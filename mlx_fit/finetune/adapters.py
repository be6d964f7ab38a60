"""Adapters in files that mlx-lm and PEFT read, and adapters of theirs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays
from mlx_fit.checks import path_of
from mlx_fit.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWriteError,
    ConfigurationError,
)
from mlx_fit.finetune import mlx_lm_files, peft_files
from mlx_fit.finetune.adapter_layers import (
    AdapterLayer,
    adapt,
    adapters_of,
    base_modules,
    is_adaptable,
)
from mlx_fit.finetune.adapter_state import AdapterState
from mlx_fit.finetune.blocks import is_quantized, listed, ordered_modules
from mlx_fit.finetune.lora import attach_layers
from mlx_fit.finetune.select import freeze
from mlx_fit.state import read_arrays, write_arrays

CONFIG = "adapter_config.json"
FORMATS = ("mlx-lm", "peft")


def save_adapters(model: nn.Module, directory: str | Path, format: str = "mlx-lm") -> None:
    """Write a model's adapters to a directory, as mlx-lm or as PEFT reads them.

    A model without adapters is written as what trains of it, which mlx-lm's layout can hold:
    ``mlx_lm.load(path, adapter_path=directory)`` then puts these parameters in.

    Args:
        model: a model after :func:`apply_lora` or :func:`select`.
        directory: made if it is missing. Each file is written whole or not at all.
        format: ``"mlx-lm"`` or ``"peft"``. PEFT calls layers as Hugging Face's model does, which
            most of mlx-lm's models do too.

    Raises:
        ConfigurationError: the layout cannot hold these adapters, and why.
        CheckpointWriteError: writing failed, or an array holds NaN or infinity.
    """
    if format not in FORMATS:
        expected = " or ".join(map(repr, FORMATS))
        raise ConfigurationError(f"format={format!r}; expected {expected}.")
    directory = _directory(directory)
    state = AdapterState.of(model)
    if not state.settings and not state.others:
        raise ConfigurationError(
            f"{type(model).__name__} has no adapters and nothing that trains, so there is nothing "
            "to save."
        )
    writer = mlx_lm_files.to_mlx_lm if format == "mlx-lm" else peft_files.to_peft
    config, arrays = writer(model, state)
    if bad := [n for n, a in arrays.items() if not mx.isfinite(a).all().item()]:
        raise CheckpointWriteError(
            f"Not saved to {directory}: these arrays hold NaN or infinity: {listed(bad)}.",
            path=directory,
        )
    path = directory / CONFIG
    text = json.dumps(config, indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Arrays under another's configuration would be misread: it goes first and comes last.
        if path.exists() and path.read_bytes() != text.encode():
            path.unlink()
    except OSError as error:
        raise CheckpointWriteError(
            f"{directory} could not be written: {error}", path=path
        ) from error
    module = mlx_lm_files if format == "mlx-lm" else peft_files
    write_arrays(directory / module.ARRAYS, arrays)
    _write_text(path, text)


def load_adapters(model: nn.Module, directory: str | Path) -> list[str]:
    """Put adapters from a directory on a model, written here, by mlx-lm or by PEFT.

    What was written is recognised. Everything else of the model is frozen, the adapters can train
    on. A model that has adapters of the same layers, ranks and scales gets the new values.

    Args:
        model: the base model. It is as before if something does not fit.
        directory: with ``adapter_config.json`` and ``adapters.safetensors`` or
            ``adapter_model.safetensors``.

    Returns:
        The dotted names of the adapted layers; of the parameters that were put in, where the file
        holds no adapters.

    Raises:
        CheckpointError: a file is missing.
        CheckpointCorruptError: a file is damaged, or not of these layouts.
        CheckpointMismatchError: it is for another model; has the names that do not fit.
        ConfigurationError: it is a kind of adapter that is not computed here, or the model has
            other adapters.
    """
    state = read_state(model, _directory(directory))
    present = adapters_of(model)
    if present and {n: _kind(s.settings) for n, s in present.items()} != {
        name: _kind(setting) for name, setting in state.settings.items()
    }:
        raise ConfigurationError(
            f"The model has other adapters already, on {listed(present)}. Take them off with "
            "detach(), or merge() them, before loading."
        )
    _check(model, state, present, str(directory))
    if not present:
        attach_layers(model, state.settings)
    layers = adapters_of(model)
    for name, layer in layers.items():
        layer.settings = state.settings[name]
        layer.dropout = nn.Dropout(layer.settings.dropout)
        layer.dropout.train(layer.training)
    own = dict(named_arrays(model.parameters()))
    values = {name: array.astype(mx.float32) for name, array in state.arrays.items()}
    others = {_inner_name(name, layers): array for name, array in state.others.items()}
    frozen = {_inner_name(name, layers): array for name, array in state.frozen.items()}
    for name, array in (others | frozen).items():
        if name in own:
            values[name] = array.astype(own[name].dtype)
    assign(model, values.items())
    if not layers:
        freeze(model)
    for name in others:
        _unfreeze(model, name)
    return [*state.settings] or [*state.others]


def read_state(model: nn.Module, directory: Path) -> AdapterState:
    """What a directory holds, in either layout."""
    path = directory / CONFIG
    config = _read_config(path)
    is_peft = "peft_type" in config
    module = peft_files if is_peft else mlx_lm_files
    file = directory / module.ARRAYS
    if is_peft and not file.exists() and file.with_suffix(".bin").exists():
        raise ConfigurationError(
            f"{file.with_suffix('.bin')} is a pickle, which is not loaded. Save it again with "
            "PEFT's save_pretrained(..., safe_serialization=True)."
        )
    try:
        arrays = read_arrays(file)
    except CheckpointError as error:
        if not file.is_file():
            raise
        raise CheckpointCorruptError(str(error), path=file) from error
    if not arrays:
        raise CheckpointCorruptError(f"{file} holds no arrays.", path=file)
    bad = [n for n, a in arrays.items() if not mx.isfinite(a).all().item()]
    if bad:
        raise CheckpointCorruptError(f"{file} holds NaN or infinity in {listed(bad)}.", path=file)
    if is_peft:
        return peft_files.from_peft(model, config, arrays, path)
    return mlx_lm_files.from_mlx_lm(config, arrays, path)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a directory that holds {CONFIG} and "
            f"{mlx_lm_files.ARRAYS} or {peft_files.ARRAYS}.",
            path=path,
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path} is not readable as JSON: {error}", path=path
        ) from error
    known = ("peft_type", "lora_parameters", "fine_tune_type")
    if not isinstance(config, dict) or not any(key in config for key in known):
        raise CheckpointCorruptError(
            f"{path} is no adapter configuration of mlx-lm or PEFT: it has none of "
            f"{', '.join(known)}.",
            path=path,
            expected=known,
        )
    return config


def _check(
    model: nn.Module, state: AdapterState, present: dict[str, AdapterLayer], directory: str
) -> None:
    """Raise unless every layer is there and every array has its shape."""
    modules = base_modules(model)
    unknown = [n for n in state.settings if n not in modules or not is_adaptable(modules[n])]
    expected: dict[str, tuple[int, ...]] = {}
    for name, setting in state.settings.items():
        if name not in unknown:
            layer = adapt(name, modules[name], setting)  # lazy: nothing is computed
            leaves = ("lora_a", "lora_b", *(("m",) if setting.dora else ()))
            expected |= {f"{name}.{leaf}": tuple(layer[leaf].shape) for leaf in leaves}
    shapes = {n: tuple(a.shape) for n, a in named_arrays(model.parameters())}
    for name in {**state.others, **state.frozen}:
        inner = _inner_name(name, present)
        owner = modules.get(name.rpartition(".")[0])
        if inner not in shapes:
            continue
        if name in state.frozen and owner is not None and is_quantized(owner):
            expected[name] = tuple(state.frozen[name].shape)  # stays as it is quantized
        else:
            expected[name] = shapes[inner]
    found = {**state.arrays, **state.others, **state.frozen}
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshapen = {
        name: (tuple(found[name].shape), expected[name])
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name].shape) != expected[name]
    }
    if not (missing or extra or misshapen or unknown):
        return
    parts = [f"missing {listed(missing)}"] if missing else []
    parts += [f"the model has nothing called {listed(extra)}"] if extra else []
    parts += [f"it has no layers to adapt called {listed(unknown)}"] if unknown else []
    parts += [f"{name} has shape {a}, expected {b}" for name, (a, b) in list(misshapen.items())[:8]]
    raise CheckpointMismatchError(
        f"The adapters in {directory} do not fit {type(model).__name__}: {'; '.join(parts)}. Load "
        "them on the base model they were trained on.",
        path=directory,
        missing=missing,
        extra=extra or unknown,
        misshapen=misshapen,
    )


def _inner_name(name: str, layers: dict[str, AdapterLayer]) -> str:
    """A base parameter's name in the adapted model: ``q_proj.bias`` is ``q_proj.linear.bias``."""
    layer, _, leaf = name.rpartition(".")
    return f"{layer}.{layers[layer].base_key}.{leaf}" if layer in layers else name


def _kind(setting: Any) -> tuple[int, float, bool]:
    return setting.rank, setting.scale, setting.dora


def _unfreeze(model: nn.Module, name: str) -> None:
    modules = dict(ordered_modules(model))
    owner = name
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    key = name.removeprefix(f"{owner}.").split(".")[0]
    modules[owner].unfreeze(recurse=False, keys=[key])


def _directory(directory: Any) -> Path:
    try:
        path = path_of("directory", directory)
    except TypeError as error:
        raise ConfigurationError(f"directory={directory!r}; expected a path.") from error
    if path.suffix == ".safetensors":
        raise ConfigurationError(
            f"directory={str(path)!r} names a file; adapters are a directory with {CONFIG} in it."
        )
    return path


def _write_text(path: Path, text: str) -> None:
    staged = path.with_name(f".tmp-{os.urandom(16).hex()}")
    try:
        try:
            with staged.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointWriteError(f"{path} could not be written: {error}", path=path) from error
