"""What preference objectives share: log-probabilities of answers, the reference, the metrics.

May import: ``objective``, ``causal_lm``, ``text``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.batch import to_mlx
from mlx_fit.causal_lm import logits_of
from mlx_fit.checks import natural
from mlx_fit.errors import DataError
from mlx_fit.modes import evaluation_mode
from mlx_fit.objective import Terms
from mlx_fit.text.preference import PreferenceBatch, PreferenceBatches, PreferenceDataset

__all__ = ["reference_log_probs"]


def answer_log_probs(model: nn.Module, batch: PreferenceBatch) -> tuple[mx.array, mx.array]:
    """Sums of the answers' log-probabilities and their numbers of tokens, float32 (pairs, 2).

    One forward pass for both answers of all pairs.
    """
    pairs, _, length = batch.tokens.shape
    tokens = batch.tokens.reshape(pairs * 2, length)
    logits = logits_of(model(tokens), tokens).astype(mx.float32)
    targets = batch.targets.reshape(pairs * 2, length, 1)
    chosen = mx.take_along_axis(logits, targets, axis=-1).squeeze(-1)
    log_probs = (chosen - mx.logsumexp(logits, axis=-1)).reshape(batch.weights.shape)
    # A padded place may hold any number, even infinity, and must not become NaN by a weight of 0.
    counted = mx.where(batch.weights > 0, log_probs, 0.0)
    return counted.sum(-1), (batch.weights > 0).sum(-1).astype(mx.float32)


def as_pairs(batch: Any) -> PreferenceBatch:
    """The batch, checked.

    Raises:
        DataError: it is no batch of pairs.
    """
    if not isinstance(batch, PreferenceBatch):
        raise DataError(
            f"The objective got a {type(batch).__name__}; expected batches of "
            "text.PreferenceBatches(text.PreferenceDataset(rows, tokenizer), batch_size)."
        )
    shape = tuple(batch.tokens.shape)
    if len(shape) != 3 or shape[1] != 2:
        raise DataError(f"tokens have shape {shape}; expected (pairs, 2, length).", field="tokens")
    return batch


def count_rewards(terms: Terms, rewards: mx.array, log_probs: mx.array) -> None:
    """Log what TRL logs, under its names: rewards, margins, accuracies, log-probabilities.

    Args:
        terms: of the batch.
        rewards: of shape (pairs, 2): chosen, rejected.
        log_probs: of the answers, of shape (pairs, 2).
    """
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": log_probs[:, 0],
        "logps/rejected": log_probs[:, 1],
    }
    for name, value in values.items():
        terms.count(name, value.mean(), terms.weight)


DIRECTIONS: dict[str, bool | None] = {
    "loss": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "rewards/chosen": True,
    "rewards/rejected": False,
    "logps/chosen": None,
    "logps/rejected": None,
}


def reference_log_probs(
    model: nn.Module, dataset: PreferenceDataset, batch_size: int = 8
) -> np.ndarray:
    """Log-probabilities of all answers under a reference model, computed once before training.

    Args:
        model: the reference, which is not changed; it may be let go of afterwards.
        dataset: the pairs.
        batch_size: pairs of a batch.

    Returns:
        float32 of shape ``(rows, 2)``, for ``PreferenceBatches(..., reference=...)``.

    Example:
        reference = reference_log_probs(model, dataset)
        batches = PreferenceBatches(dataset, 8, reference=reference)
        Trainer(model, optimizer, objective=DPO(reference="precomputed")).fit(batches)
    """
    natural("batch_size", batch_size, 1)
    found = np.zeros((len(dataset), 2), np.float32)
    with evaluation_mode(model):
        for index in range(0, len(dataset), batch_size):
            rows = range(index, min(index + batch_size, len(dataset)))
            width = int(dataset.lengths[index : index + batch_size].max())
            batch = PreferenceBatches.stack(dataset, rows, width)
            # Host synchronisation, once for each batch and before training.
            found[rows.start : rows.stop] = np.array(answer_log_probs(model, to_mlx(batch))[0])
    return found
