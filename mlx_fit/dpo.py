"""Direct preference optimization.

May import: ``preference``, ``objective``, ``finetune``, ``text``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import named_arrays
from mlx_fit.checks import number
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import LEAVES, adapters_of
from mlx_fit.finetune.merging import disabled
from mlx_fit.modes import evaluation_mode
from mlx_fit.objective import Objective, Terms
from mlx_fit.preference import DIRECTIONS, AnswerLogProbs, as_pairs, count_rewards
from mlx_fit.text.preference import PreferenceBatch

__all__ = ["DPO"]

ADAPTERS_OFF, PRECOMPUTED = "adapters_off", "precomputed"


class DPO(Objective):
    """Prefer the chosen answer to the rejected one, without straying from a reference model.

    The loss of a pair (Rafailov et al. 2023, arXiv 2305.18290, equation 7) is
    ``-log(sigmoid(beta * h))``, where ``h`` is how much more the model prefers the chosen answer
    than the reference does: the difference of the sums of log-probabilities. With label smoothing e
    it is ``-(1 - e) * log(sigmoid(beta * h)) - e * log(sigmoid(-beta * h))`` (conservative DPO).
    Averaged over pairs.

    A batch is a :class:`~mlx_fit.text.PreferenceBatch`. Logged, by TRL's names: ``loss``,
    ``rewards/chosen``, ``rewards/rejected`` (``beta`` times the log-ratio to the reference),
    ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``, ``logps/rejected``.

    Args:
        beta: how strongly the model is held to the reference.
        label_smoothing: share of labels that are thought to be wrong, in [0, 0.5).
        reference: ``"adapters_off"``: the model itself with its adapters switched off, which takes
            no memory for another model; ``"precomputed"``: ``batch.reference``; or a model, which
            is frozen and put into evaluation mode.
        chunk_size: tokens of the flattened batch whose logits are in memory at a time; None: all of
            those that count. Models must have their body apart from their head, as for
            :class:`~mlx_fit.CausalLM`.

    Raises:
        ConfigurationError: an argument cannot work, or more than adapters trains, so that the base
            is no reference.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference: str | nn.Module = ADAPTERS_OFF,
        chunk_size: int | None = None,
    ) -> None:
        self.beta = number("beta", beta, 0.0)
        if self.beta == 0:
            raise ConfigurationError("beta=0 ignores the answers; expected a positive number.")
        self.label_smoothing = number("label_smoothing", label_smoothing, 0.0, below=0.5)
        self._answers = AnswerLogProbs(chunk_size)
        self.chunk_size = self._answers.chunk_size
        self.variant: int | None = None  # how many positions the head runs for
        self._source = reference
        # In a list: a model as an attribute would be one more thing that a trainer looks into.
        self._reference: list[nn.Module] = []
        if isinstance(reference, nn.Module):
            reference.freeze()
            reference.eval()
            mx.eval(reference.parameters())
            self._reference = [reference]
        elif reference not in (ADAPTERS_OFF, PRECOMPUTED):
            raise ConfigurationError(
                f"reference={reference!r}; expected {ADAPTERS_OFF!r}, {PRECOMPUTED!r} or a model."
            )

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        batch = as_pairs(batch)
        log_probs, _ = self._answers(model, batch)
        rewards = self.beta * (log_probs - self._reference_of(model, batch))
        margins = rewards[:, 0] - rewards[:, 1]
        # -log(sigmoid(x)) = logaddexp(0, -x), finite for any x.
        losses = mx.logaddexp(0.0, -margins)
        if self.label_smoothing:
            wrong = mx.logaddexp(0.0, margins)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * wrong
        terms = Terms(losses.mean(), batch.tokens.shape[0])
        terms.count("loss", terms.mean, terms.weight)
        count_rewards(terms, rewards, log_probs)
        return terms

    def _reference_of(self, model: nn.Module, batch: PreferenceBatch) -> mx.array:
        if self._source == PRECOMPUTED:
            return batch.reference.astype(mx.float32)
        if self._reference:
            if self._reference[0] is model:
                raise ConfigurationError(
                    "reference is the model that trains; give a copy, or reference='adapters_off'."
                )
            return mx.stop_gradient(self._answers(self._reference[0], batch)[0])
        with _base_of(model):
            return mx.stop_gradient(self._answers(model, batch)[0])

    def host_weight(self, batch: Any) -> float | None:
        """The number of pairs."""
        batch = as_pairs(batch)
        on_host = not isinstance(batch.reference, mx.array)
        if self._source == PRECOMPUTED and on_host and not batch.reference.any():
            raise ConfigurationError(
                "reference='precomputed', but the batch has none: give PreferenceBatches(..., "
                "reference=reference_log_probs(model, dataset))."
            )
        self._answers.see(batch)
        self.variant = self._answers.kept
        return float(batch.tokens.shape[0])

    def start(self, model: nn.Module) -> None:
        """See whether the heads of the models can be run by themselves."""
        self._answers.start(model, *self._reference)

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """The trace shows what does not fit."""

    @property
    def directions(self) -> dict[str, bool | None]:
        """The loss is better lower; accuracies and margins are better higher."""
        return dict(DIRECTIONS)


@contextmanager
def _base_of(model: nn.Module) -> Iterator[None]:
    """The model as its frozen base inside, without dropout."""
    if not adapters_of(model):
        raise ConfigurationError(
            f"reference='adapters_off', but {type(model).__name__} has no adapters: use "
            "finetune.apply_lora(model), give a frozen copy of the model as reference, or "
            "'precomputed'."
        )
    others = [n for n, _ in named_arrays(model.trainable_parameters())
              if n.rpartition(".")[2] not in LEAVES]  # fmt: skip
    if others:
        raise ConfigurationError(
            f"reference='adapters_off', but {others[0]} trains as well as the adapters, so that "
            "the base does not stay as it was. Give a copy of the model, or 'precomputed'."
        )
    with disabled(model), evaluation_mode(model):
        yield
