"""From settings to a trainer: what trains, the optimizer, the objective, the batches."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit import finetune
from mlx_fit._tree import assign, named_arrays
from mlx_fit.causal_lm import CausalLM
from mlx_fit.cli.language_models import import_mlx_lm
from mlx_fit.cli.preferences import (
    describe_loss,
    describe_pairs,
    make_pair_objective,
    pair_batches,
    takes_pairs,
)
from mlx_fit.errors import CheckpointMismatchError, ConfigurationError
from mlx_fit.finetune.blocks import listed, require_blocks
from mlx_fit.finetune.routers import RouterLoss
from mlx_fit.objective import Objective
from mlx_fit.schedules import constant_warmup, warmup_cosine, warmup_linear
from mlx_fit.state import read_arrays
from mlx_fit.text import BucketBatches, PackedBatches, PreferenceDataset, TextDataset

LARGE_VOCABULARY = 16_384  # from here on whole logits cost more than the rest
CHUNK = 128  # tokens: LoRA's peak is 0.30 of that with whole logits (benchmarks/chunked_loss.py)
OPTIMIZERS = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
    "lion": optim.Lion,
    "muon": optim.Muon,
}


def choose_what_trains(model: nn.Module, settings: argparse.Namespace) -> None:
    """Adapters, the last blocks, or everything; and what these begin with."""
    if settings.float32:
        model.set_dtype(mx.float32)
    mx.random.seed(settings.seed)  # of the adapters' first values
    if settings.full:
        finetune.select(model, patterns=["*"])
    elif settings.last_layers is not None:
        count = settings.last_layers
        if count < 0:
            count = len(require_blocks(model, "--last-layers").modules)
        finetune.select(model, last_layers=count, head=settings.head)
    else:
        finetune.apply_lora(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets,
            dora=settings.dora,
            last_layers=settings.lora_layers,
            rslora=settings.rslora,
        )
    if settings.start_from is not None:
        _start_from(model, Path(settings.start_from).expanduser())


def _start_from(model: nn.Module, path: Path) -> None:
    """Put the arrays of a file, or of the file in a folder, into what trains."""
    file = path / "adapters.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(f"--start-from {path}: {file} does not exist.")
    arrays = read_arrays(file)
    own = dict(named_arrays(model.trainable_parameters()))
    missing, extra = sorted(own.keys() - arrays.keys()), sorted(arrays.keys() - own.keys())
    misshapen = {
        name: (tuple(arrays[name].shape), tuple(own[name].shape))
        for name in own.keys() & arrays.keys()
        if arrays[name].shape != own[name].shape
    }
    if missing or extra or misshapen:
        parts = [f"{what} {listed(names)}" for what, names in
                 (("missing", missing), ("unknown", extra), ("of another shape", misshapen))
                 if names]  # fmt: skip
        raise CheckpointMismatchError(
            f"--start-from {file} does not fit what trains here: {'; '.join(parts)}. Give the "
            "rank, targets and layers that it was trained with.",
            path=file,
            missing=missing,
            extra=extra,
            misshapen=misshapen,
        )
    assign(model, [(name, arrays[name].astype(own[name].dtype)) for name in own])


def make_batches(rows: Any, model: nn.Module, settings: argparse.Namespace) -> Any:
    """The loader of training batches."""
    if isinstance(rows, PreferenceDataset):
        chunk = choose_chunk(model, settings.chunk_size)
        return pair_batches(rows, model, settings, shuffle=True, chunk_size=chunk)
    if settings.pack is not None:
        return PackedBatches(rows, settings.batch_size, settings.pack, seed=settings.seed)
    return BucketBatches(rows, settings.batch_size, settings.max_shapes, seed=settings.seed)


def held_out_batches(rows: Any, model: nn.Module, settings: argparse.Namespace) -> Any:
    """The loader of validation or test batches: the same ones each time."""
    if isinstance(rows, PreferenceDataset):
        chunk = choose_chunk(model, settings.chunk_size)
        return pair_batches(rows, model, settings, shuffle=False, chunk_size=chunk)
    return BucketBatches(rows, settings.batch_size, settings.max_shapes, shuffle=False, seed=0)


def describe_rows(rows: TextDataset | PreferenceDataset, settings: argparse.Namespace) -> str:
    """What was read, and how it pads."""
    if isinstance(rows, PreferenceDataset):
        return describe_pairs(rows)
    return str(rows.report(settings.batch_size, settings.max_shapes))


def count_steps(settings: argparse.Namespace, num_batches: int) -> tuple[int, int]:
    """Epochs and updates of the run."""
    each = math.ceil(num_batches / settings.gradient_accumulation)
    if settings.epochs is not None:
        steps = settings.epochs * each
        return settings.epochs, min(steps, settings.max_steps or steps)
    return math.ceil(settings.max_steps / each), settings.max_steps


def make_optimizer(settings: argparse.Namespace, steps: int) -> optim.Optimizer:
    """MLX's optimizer with the schedule.

    Raises:
        ConfigurationError: it does not take what ``optimizer_config`` says.
    """
    options = dict(settings.optimizer_config or {})
    if settings.weight_decay is not None:
        options["weight_decay"] = settings.weight_decay
    kind: Any = OPTIMIZERS[settings.optimizer]
    try:
        return kind(learning_rate=_schedule(settings, steps), **options)
    except TypeError as error:
        raise ConfigurationError(
            f"--optimizer {settings.optimizer} cannot be made with {options}: {error}"
        ) from error


def _schedule(settings: argparse.Namespace, steps: int) -> Any:
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.lr_schedule is not None:
        return _of_mlx_lm(settings.lr_schedule)
    if settings.schedule == "constant":
        return constant_warmup(peak, warmup) if warmup else peak
    if not warmup < steps:
        raise ConfigurationError(
            f"--warmup-steps {warmup} must be below the {steps} updates of the run."
        )
    make: Callable[..., Any] = warmup_cosine if settings.schedule == "cosine" else warmup_linear
    return make(peak, steps, warmup)


def _of_mlx_lm(config: dict[str, Any]) -> Any:
    import_mlx_lm()
    from mlx_lm.tuner.utils import build_schedule

    known = {"name", "arguments", "warmup", "warmup_init"}
    if unknown := config.keys() - known:
        raise ConfigurationError(
            f"lr_schedule has {', '.join(sorted(unknown))}; expected {', '.join(sorted(known))}."
        )
    try:
        return build_schedule(config)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ConfigurationError(
            f"lr_schedule {config} is none of mlx.optimizers: {error!r}. Write "
            "{name = 'cosine_decay', arguments = [1e-4, 1000], warmup = 100}."
        ) from error


def make_router_loss(model: nn.Module, settings: argparse.Namespace) -> RouterLoss | None:
    """The load-balancing loss of a mixture of experts, where it is wanted."""
    weight = settings.router_loss_weight
    return RouterLoss(model, weight) if weight else None


def make_objective(
    model: nn.Module, settings: argparse.Namespace, router_loss: RouterLoss | None
) -> Objective:
    """The loss: of pairs, or of the next token, in chunks where the vocabulary is large."""
    chunk = choose_chunk(model, settings.chunk_size)
    if takes_pairs(settings):
        return make_pair_objective(model, settings, chunk)
    return CausalLM(settings.label_smoothing, settings.z_loss, chunk, router_loss)


def describe_objective(model: nn.Module, settings: argparse.Namespace) -> str:
    """The loss in a few words."""
    chunk = choose_chunk(model, settings.chunk_size)
    logits = f"logits of {chunk} tokens at a time" if chunk else "all logits at once"
    return f"{describe_loss(settings, model)}; {logits}" if takes_pairs(settings) else logits


def choose_chunk(model: nn.Module, wanted: int | None) -> int | None:
    """Tokens whose logits are in memory at a time; None: all.

    Args:
        model: what is trained or evaluated.
        wanted: 0 stands for all; None chooses.
    """
    if wanted is None:
        return CHUNK if _can_be_chunked(model) else None
    return wanted or None


def _can_be_chunked(model: nn.Module) -> bool:
    tokens = mx.zeros((1, 4), mx.int32)
    logits = model(tokens)
    if not isinstance(logits, mx.array) or logits.shape[-1] < LARGE_VOCABULARY:
        return False
    try:
        mx.eval(CausalLM(chunk_size=2)(model, (tokens, tokens)).mean)
    except ConfigurationError:  # its head cannot be told from its body
        return False
    return True
