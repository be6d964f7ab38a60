"""Odds-ratio preference optimization. May import: ``preference``, ``objective``, ``text``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.checks import number
from mlx_fit.objective import Objective, Terms
from mlx_fit.preference import DIRECTIONS, AnswerLogProbs, as_pairs, count_rewards

__all__ = ["ORPO"]

CERTAIN = -1e-6  # the largest mean log-probability: the odds of 1 are infinite


class ORPO(Objective):
    """Learn the chosen answer, and prefer it to the rejected one, without a reference model.

    The loss of a pair (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7) is
    ``nll + beta * -log(sigmoid(log(odds(chosen) / odds(rejected))))``, where ``nll`` is the mean
    negative log-likelihood of the chosen answer's tokens, ``odds(y) = P(y) / (1 - P(y))`` and
    ``log P`` is the mean log-probability of a token of the answer (equation 3). Averaged over
    pairs. TRL averages ``nll`` over the tokens of a batch, prompts included, so its losses differ.

    A batch is a :class:`~mlx_fit.text.PreferenceBatch`. Logged, by TRL's names: ``loss``,
    ``nll_loss``, ``log_odds_ratio`` (the log of the sigmoid), ``log_odds_chosen``, and
    ``rewards/...`` (``beta`` times the mean log-probabilities) and ``logps/...`` (these means).

    Args:
        beta: factor of the odds ratio's loss, the paper's lambda.
        chunk_size: tokens of the flattened batch whose logits are in memory at a time; None: all of
            those that count. The model must have its body apart from its head, as for
            :class:`~mlx_fit.CausalLM`.

    Raises:
        ConfigurationError: ``beta`` is no number of at least 0, or ``chunk_size`` no integer of at
            least 1.
    """

    def __init__(self, beta: float = 0.1, chunk_size: int | None = None) -> None:
        self.beta = number("beta", beta, 0.0)
        self._answers = AnswerLogProbs(chunk_size)
        self.chunk_size = self._answers.chunk_size
        self.variant: int | None = None  # how many positions the head runs for

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        batch = as_pairs(batch)
        sums, counts = self._answers(model, batch)
        means = sums / mx.maximum(counts, 1.0)
        nll = -means[:, 0].mean()
        below = mx.minimum(means, CERTAIN)
        log_odds = below - mx.log(-mx.expm1(below))  # log P - log(1 - P)
        ratios = log_odds[:, 0] - log_odds[:, 1]
        log_sigmoid = -mx.logaddexp(0.0, -ratios)
        terms = Terms(nll - self.beta * log_sigmoid.mean(), batch.tokens.shape[0])
        terms.count("loss", terms.mean, terms.weight)
        terms.count("nll_loss", nll, terms.weight)
        terms.count("log_odds_ratio", log_sigmoid.mean(), terms.weight)
        terms.count("log_odds_chosen", ratios.mean(), terms.weight)
        count_rewards(terms, self.beta * means, means)
        return terms

    def host_weight(self, batch: Any) -> float | None:
        """The number of pairs."""
        batch = as_pairs(batch)
        self._answers.see(batch)
        self.variant = self._answers.kept
        return float(batch.tokens.shape[0])

    def start(self, model: nn.Module) -> None:
        """See whether the model's head can be run by itself."""
        self._answers.start(model)

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """The trace shows what does not fit."""

    @property
    def directions(self) -> dict[str, bool | None]:
        """Losses are better lower; accuracies, margins and odds are better higher."""
        odds = {"log_odds_ratio": True, "log_odds_chosen": True}
        return {**DIRECTIONS, "nll_loss": False, **odds}
