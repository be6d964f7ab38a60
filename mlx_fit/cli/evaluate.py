"""Loss of a language model on text, or on pairs of answers, with or without adapters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_fit.causal_lm import CausalLM
from mlx_fit.cli.fine_tuning import RECORD
from mlx_fit.cli.finetune_settings import MODEL_SETTINGS, TEXT_SETTINGS
from mlx_fit.cli.language_models import Loaded, load_adapted, load_model
from mlx_fit.cli.preferences import (
    BETA,
    CAUSAL_LM,
    OBJECTIVES,
    REWARDS,
    check_values,
    describe_rewards,
    refuse_text_settings,
)
from mlx_fit.cli.settings import Setting, add_flags, checking_usage, read_toml, resolve
from mlx_fit.cli.text_data import check_data, has_pairs, require_part
from mlx_fit.cli.training import choose_chunk, choose_what_trains
from mlx_fit.dpo import ADAPTERS_OFF, DPO
from mlx_fit.errors import CheckpointError, ConfigurationError
from mlx_fit.finetune.adapter_layers import adapters_of
from mlx_fit.objective import Objective
from mlx_fit.orpo import ORPO
from mlx_fit.text import BucketBatches, PreferenceBatches
from mlx_fit.trainer import Trainer

SETTINGS = (
    *MODEL_SETTINGS,
    *TEXT_SETTINGS,
    Setting("adapter_path", str, None, "folder with adapters, of mlx-lm or PEFT"),
    Setting("split", str, "test", "of a folder", choices=("train", "valid", "test")),
    Setting("batches", int, None, "at most so many", least=1),
    Setting("objective", str, None, "default: of text causal-lm; of pairs what the adapters were "
            "trained for", choices=(CAUSAL_LM, *OBJECTIVES)),
    Setting("beta", float, None, f"of dpo and orpo (default: of the run, or {BETA})", least=0.0),
    Setting("label_smoothing", float, None, "of dpo (default: of the run, or 0)", least=0.0),
    Setting("reference", str, None, "folder of the model that dpo compares with (default: --model "
            "without adapters, or what the run began with)"),
    Setting("chunk_size", int, None, "tokens whose logits are in memory; 0: all", least=0),
    Setting("json", bool, False, "print one line of JSON"),
)  # fmt: skip
FOR_PAIRS = ("beta", "label_smoothing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit evaluate``."""
    add_flags(parser, SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    with checking_usage():
        settings, _ = resolve(arguments, SETTINGS, {}, "")
        for required in ("model", "data"):
            if getattr(settings, required) is None:
                raise ConfigurationError(f"--{required} is missing.")
    check_data(settings.data)
    record = _record(settings.adapter_path)
    if settings.objective is None:
        settings.objective = _objective_of_rows(settings, record)
    with checking_usage():
        _fill_in(settings, record)
    loaded = load_adapted(settings)
    is_pairs = settings.objective in OBJECTIVES
    rows: Any = require_part(settings, loaded.tokenizer, settings.split, is_pairs)
    kind = PreferenceBatches if is_pairs else BucketBatches
    batches = kind(rows, settings.batch_size, settings.max_shapes, shuffle=False, seed=0)
    trainer = Trainer(loaded.model, objective=_make_objective(loaded, settings, record))
    found = trainer.evaluate(batches, steps=settings.batches, verbose=0)
    if settings.json:
        keys = ("loss", *REWARDS) if is_pairs else ("loss", "perplexity", "num_tokens")
        print(json.dumps({key: found[key] for key in keys}))
        return 0
    part = settings.batches is not None and settings.batches < len(batches)
    where = f"{settings.batches:,} of {len(batches):,} batches" if part else f"{len(rows):,} rows"
    print(f"{rows.name}: {_described(found, settings)} of {where}")
    return 0


def _objective_of_rows(settings: argparse.Namespace, record: Mapping[str, Any]) -> str:
    """By the kind of the rows, and for pairs by the record of the adapters' run.

    Raises:
        ConfigurationError: that record names none for pairs, or there is none.
    """
    if settings.format != "auto" or not has_pairs(settings):
        return CAUSAL_LM
    found: str = record.get("objective", CAUSAL_LM)
    if found not in OBJECTIVES:
        raise ConfigurationError(
            f"--data {settings.data}: its rows have 'chosen' and 'rejected', so they are "
            f"preferences. Say --objective dpo or orpo: no {RECORD} of the adapters' run does."
        )
    return found


def _fill_in(settings: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """What was not given, from the record of the adapters' run.

    Raises:
        ConfigurationError: a setting has no meaning for the objective.
    """
    if settings.objective not in OBJECTIVES:
        for name in (*FOR_PAIRS, "reference"):
            if getattr(settings, name) is not None:
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} goes with --objective dpo or orpo."
                )
        return
    refuse_text_settings(settings)
    if settings.objective == "orpo":
        for name in ("reference", "label_smoothing"):
            if getattr(settings, name) is not None:
                raise ConfigurationError(f"--{name.replace('_', '-')} is not for --objective orpo.")
    elif settings.adapter_path is None and settings.reference is None:
        raise ConfigurationError(
            "--objective dpo compares with a reference: give --adapter-path, whose base it is, or "
            "the folder of another model as --reference."
        )
    same = record.get("objective") == settings.objective
    for name, default in zip(FOR_PAIRS, (BETA, 0.0), strict=True):
        if getattr(settings, name) is None:
            setattr(settings, name, record.get(name, default) if same else default)
    check_values(settings)


def _record(folder: str | None) -> dict[str, Any]:
    """The settings of the run that wrote the adapters, if it was one of ``mlx-fit finetune``."""
    path = None if folder is None else Path(folder).expanduser() / RECORD
    return read_toml(path) if path is not None and path.is_file() else {}


def _make_objective(
    loaded: Loaded, settings: argparse.Namespace, record: Mapping[str, Any]
) -> Objective:
    chunk = choose_chunk(loaded.model, settings.chunk_size)
    if settings.objective == "orpo":
        return ORPO(settings.beta, chunk)
    if settings.objective == "dpo":
        reference = _reference(loaded.model, settings, record)
        return DPO(settings.beta, settings.label_smoothing, reference, chunk)
    return CausalLM(chunk_size=chunk)


def _reference(
    model: nn.Module, settings: argparse.Namespace, record: Mapping[str, Any]
) -> str | nn.Module:
    """The base below the adapters; a model of its own where there are none, or another is given."""
    if settings.reference is None and adapters_of(model):
        return ADAPTERS_OFF
    if settings.reference is not None:
        other = {"model": settings.reference, "quantize": None}
        try:
            return load_model(argparse.Namespace(**vars(settings) | other)).model
        except ConfigurationError as error:
            text = str(error).replace("--model", "--reference", 1)
            raise ConfigurationError(text) from error
    reference = load_model(settings).model
    if record.get("objective") == settings.objective and "start_from" in record:
        _begin_as(reference, settings, record)
    return reference


def _begin_as(model: nn.Module, settings: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Put in what a run without adapters began with, which was its reference.

    Raises:
        ConfigurationError: it is not there any more, or does not fit.
    """
    begun = Path(record["start_from"]).expanduser()
    folder = begun if begun.is_dir() else begun.parent
    try:
        if folder.resolve() == Path(settings.adapter_path).expanduser().resolve():
            raise ConfigurationError("the run wrote over it.")
        as_begun = {key: record.get(key) for key in ("full", "last_layers", "head", "start_from")}
        seed = record.get("seed", 0)
        choose_what_trains(model, argparse.Namespace(float32=False, seed=seed, **as_begun))
    except (CheckpointError, ConfigurationError) as error:
        raise ConfigurationError(
            f"The run of --adapter-path {settings.adapter_path} compared with what it began with, "
            f"{begun}, which cannot be used: {error} Say with --reference which folder's model "
            "to compare with."
        ) from error


def _described(found: Mapping[str, float], settings: argparse.Namespace) -> str:
    if settings.objective in OBJECTIVES:
        return describe_rewards(found)
    return (
        f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}, "
        f"accuracy {found['accuracy']:.4f} over {found['num_tokens']:,.0f} target tokens"
    )
