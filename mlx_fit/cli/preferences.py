"""Pairs of answers on the command line: their batches, the objective, what a dry run shows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import mlx.nn as nn
import numpy as np

from mlx_fit.batch import TextBatch
from mlx_fit.cli.settings import Setting
from mlx_fit.dpo import ADAPTERS_OFF, DPO, PRECOMPUTED
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import adapters_of
from mlx_fit.objective import Objective
from mlx_fit.orpo import ORPO
from mlx_fit.preference import reference_log_probs
from mlx_fit.text import PreferenceBatches, PreferenceDataset
from mlx_fit.text.preference import PreferenceBatch

CAUSAL_LM, OBJECTIVES = "causal-lm", ("dpo", "orpo")
BETA = 0.1
# What pairs have no use for, and what it must be.
NOT_FOR_PAIRS = {
    "pack": None,
    "format": "auto",
    "train_on": "completions",
    "use_chat_template": False,
    "z_loss": 0.0,
    "router_loss_weight": 0.0,
}
REWARDS = ("rewards/margins", "rewards/accuracies")  # that are printed
SETTINGS = (
    Setting("objective", str, CAUSAL_LM, "what is learned: the next token, or from pairs of a "
            "chosen and a rejected answer", choices=(CAUSAL_LM, *OBJECTIVES)),
    Setting("beta", float, None, f"of dpo and orpo (default {BETA})", least=0.0),
)  # fmt: skip


def check_objective(settings: argparse.Namespace) -> None:
    """Fill in what the objective needs.

    Raises:
        ConfigurationError: a setting has no meaning for the objective.
    """
    if not takes_pairs(settings):
        if settings.beta is not None:
            raise ConfigurationError("--beta goes with --objective dpo or orpo.")
        return
    refuse_text_settings(settings)
    if settings.objective == "orpo" and settings.label_smoothing:
        raise ConfigurationError("--label-smoothing is not for --objective orpo.")
    settings.beta = BETA if settings.beta is None else settings.beta
    check_values(settings)


def check_values(settings: argparse.Namespace) -> None:
    """Raise for a number that the objective of pairs cannot work with."""
    if settings.objective != "dpo":
        return
    if not settings.beta > 0:
        raise ConfigurationError(
            f"--beta {settings.beta:g}: dpo would ignore the answers; expected a number above 0."
        )
    if not settings.label_smoothing < 0.5:
        raise ConfigurationError(
            f"--label-smoothing {settings.label_smoothing:g}: from a half on, dpo would learn the "
            "opposite; expected a number below 0.5."
        )


def refuse_text_settings(settings: argparse.Namespace) -> None:
    """Raise for a setting that pairs of answers have no use for."""
    for key, default in NOT_FOR_PAIRS.items():
        if getattr(settings, key, default) != default:
            raise ConfigurationError(
                f"--{key.replace('_', '-')} has no meaning for --objective {settings.objective}: "
                "its rows are pairs of answers, of which the answers' tokens count."
            )


def describe_rewards(found: Mapping[str, float]) -> str:
    """The loss of pairs, and how much and how often the better answer is preferred."""
    values = ", ".join(f"{name} {found[name]:.4f}" for name in REWARDS)
    return f"loss {found['loss']:.4f}, {values}"


def takes_pairs(settings: argparse.Namespace) -> bool:
    """Whether the rows are pairs of answers."""
    return settings.objective in OBJECTIVES


def pair_batches(
    rows: PreferenceDataset,
    model: nn.Module,
    settings: argparse.Namespace,
    shuffle: bool,
    chunk_size: int | None,
) -> PreferenceBatches:
    """The loader of pairs, with the reference's log-probabilities where there are no adapters.

    Args:
        rows: the pairs.
        model: as training begins: the reference, where its base will not stay.
        settings: of the run.
        shuffle: a new order each epoch; otherwise the same batches each time.
        chunk_size: tokens whose logits are in memory at a time; None: all.
    """
    reference = None
    if settings.objective == "dpo" and not adapters_of(model):
        reference = reference_log_probs(model, rows, settings.batch_size, chunk_size)
    seed = settings.seed if shuffle else 0
    return PreferenceBatches(
        rows, settings.batch_size, settings.max_shapes, shuffle, seed, reference
    )


def make_pair_objective(
    model: nn.Module, settings: argparse.Namespace, chunk_size: int | None
) -> Objective:
    """DPO or ORPO. DPO's reference is the base below the adapters, or was computed beforehand."""
    if settings.objective == "orpo":
        return ORPO(settings.beta, chunk_size)
    reference = ADAPTERS_OFF if adapters_of(model) else PRECOMPUTED
    return DPO(settings.beta, settings.label_smoothing, reference, chunk_size)


def describe_pairs(rows: PreferenceDataset) -> str:
    """What was read."""
    lengths = rows.lengths
    found = f"{rows.name}: {len(rows):,} of {rows.num_read:,} pairs"
    for name, tally in (("cut", rows.cut), ("dropped", rows.dropped), ("bad", rows.skipped)):
        if tally.count:
            found += f", {tally.count:,} {name}"
    if not len(rows):
        return found
    mean = float(lengths.mean())
    return (
        f"{found}\ntokens of the longer answer: {lengths.min()} to {lengths.max()}, mean {mean:.1f}"
    )


def describe_loss(settings: argparse.Namespace, model: nn.Module) -> str:
    """The objective in a few words."""
    if settings.objective == "orpo":
        return f"ORPO, beta {settings.beta:g}"
    reference = "the base without adapters" if adapters_of(model) else "the model as it begins"
    return f"DPO, beta {settings.beta:g}, against {reference}"


def as_text(batch: PreferenceBatch) -> TextBatch:
    """A batch of pairs as rows of text: the chosen answer of each pair, then the rejected one."""
    length = batch.tokens.shape[-1]
    tokens, targets, weights = (np.asarray(part).reshape(-1, length) for part in batch[:3])
    # A row ends with its last target, which stands one further on.
    ends = length - np.argmax(weights[:, ::-1] > 0, axis=1)
    segments = (np.arange(length)[None] <= ends[:, None]).astype(np.int32)
    return TextBatch(tokens, targets, weights, segments)
