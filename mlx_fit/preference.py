"""What preference objectives share: log-probabilities of answers, the reference, the metrics.

May import: ``objective``, ``causal_lm``, ``head_apart``, ``text``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.batch import to_mlx
from mlx_fit.body_head import SplitModel, logits_of
from mlx_fit.causal_lm import is_traced
from mlx_fit.checks import natural
from mlx_fit.chunked_loss import chunked_log_probs, log_probs
from mlx_fit.counted import capacity, positions
from mlx_fit.errors import DataError
from mlx_fit.head_apart import HeadApart
from mlx_fit.modes import evaluation_mode
from mlx_fit.objective import Terms
from mlx_fit.text.preference import PreferenceBatch, PreferenceBatches, PreferenceDataset

__all__ = ["reference_log_probs"]


class AnswerLogProbs:
    """Log-probabilities of whole answers under a model, without the logits of prompts and padding.

    Args:
        chunk_size: tokens of the flattened batch whose logits are in memory at a time; None: all
            that count, up to an eighth of the batch, where the head can be run by itself.

    Attributes:
        kept: how many positions of the batch at hand the head runs for; None: all.

    Raises:
        ConfigurationError: ``chunk_size`` is no integer of at least 1.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self.chunk_size = None if chunk_size is None else natural("chunk_size", chunk_size, 1)
        self.kept: int | None = None
        self._apart = HeadApart(self.chunk_size)

    def start(self, *models: nn.Module) -> None:
        """Look at the models of a new run.

        Raises:
            ConfigurationError: ``chunk_size`` needs a head apart from the body, and one has none.
        """
        self._apart.forget()
        for model in models:
            self._apart.look_at(model)

    def see(self, batch: PreferenceBatch) -> None:
        """Look at a batch that has values, for :attr:`kept`."""
        self.kept = None
        weights = batch.weights
        if not self._apart.never and not (isinstance(weights, mx.array) and is_traced(weights)):
            pairs, sides, length = weights.shape
            rows = np.asarray(weights).reshape(-1, length)
            self.kept = capacity(rows, (pairs * sides, length))

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> tuple[mx.array, mx.array]:
        """Sums of the answers' log-probabilities and their numbers of tokens, float32 (pairs, 2).

        One forward pass for both answers of all pairs.
        """
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        if not is_traced(tokens):  # only what is compiled relies on what the host saw of the batch
            self._apart.look_at(model)
            self.see(batch)
        weights = batch.weights.reshape(-1)
        # What does not count may hold any number, and must not index beyond the logits.
        targets = mx.where(weights > 0, batch.targets.reshape(-1), 0).astype(mx.int32)
        found = self._apart.run(model, tokens, self.kept)
        if isinstance(found, SplitModel):
            values = self._of_split(found, tokens, targets, weights)
        else:
            logits = logits_of(found, tokens)
            values = log_probs(logits.reshape(-1, logits.shape[-1]), targets)
        # A padded place may hold any number, even infinity: no NaN may come of a weight of 0.
        counted = mx.where(weights > 0, values, 0.0).reshape(batch.weights.shape)
        return counted.sum(-1), (batch.weights > 0).sum(-1).astype(mx.float32)

    def _of_split(
        self, split: SplitModel, tokens: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        """The log-probability of each target, anything where its weight is 0."""
        hidden, tokens = split.hidden.reshape(-1, split.hidden.shape[-1]), tokens.reshape(-1)
        places = None if self.kept is None else positions(weights, self.kept)
        if places is not None:
            hidden, tokens, targets = (array[places] for array in (hidden, tokens, targets))
        if self.chunk_size is None or self.chunk_size >= len(hidden):
            logits = split.head(hidden[None], tokens[None], split.parameters)
            found = log_probs(logits.reshape(-1, logits.shape[-1]), targets)
        else:
            found = chunked_log_probs(
                split.head,
                hidden,
                split.parameters,
                tokens,
                targets,
                self.chunk_size,
                split.model.training,
            )
        return found if places is None else mx.zeros(weights.shape).at[places].add(found)


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
    model: nn.Module,
    dataset: PreferenceDataset,
    batch_size: int = 8,
    chunk_size: int | None = None,
) -> np.ndarray:
    """Log-probabilities of all answers under a reference model, computed once before training.

    Args:
        model: the reference, which is not changed; it may be let go of afterwards.
        dataset: the pairs.
        batch_size: pairs of a batch.
        chunk_size: tokens of a batch whose logits are in memory at a time; None: all.

    Returns:
        float32 of shape ``(rows, 2)``, for ``PreferenceBatches(..., reference=...)``.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        reference = reference_log_probs(model, dataset)
        batches = PreferenceBatches(dataset, 8, reference=reference)
        Trainer(model, optimizer, objective=DPO(reference="precomputed")).fit(batches)
    """
    natural("batch_size", batch_size, 1)
    answers = AnswerLogProbs(chunk_size)
    found = np.zeros((len(dataset), 2), np.float32)
    with evaluation_mode(model):
        for index in range(0, len(dataset), batch_size):
            rows = range(index, min(index + batch_size, len(dataset)))
            width = int(dataset.lengths[index : index + batch_size].max())
            batch = PreferenceBatches.stack(dataset, rows, width)
            # Host synchronisation, once for each batch and before training.
            found[rows.start : rows.stop] = np.array(answers(model, to_mlx(batch))[0])
    return found
