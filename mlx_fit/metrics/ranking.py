"""Metrics of the order of scores, exact: they keep the scores of all rows."""

from __future__ import annotations

import math
from abc import abstractmethod

import mlx.core as mx
import numpy as np

from mlx_fit.metrics.base import HostState, Metric, State, per_element
from mlx_fit.metrics.classification import is_binary, labels, valid


def roc_area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The weighted share of pairs of a positive and a negative in order, ties counting one half.

    Args:
        positives: their weight at every level of score, rising, float64 of shape ``(levels,)``.
        negatives: the same for negatives.

    Returns:
        A share in [0, 1]; NaN if there are no pairs.
    """
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else math.nan


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The mean over positives of the precision at their level; see :func:`roc_area`.

    Returns:
        A share in [0, 1]; NaN without positives.
    """
    found = positives[::-1].cumsum()[::-1]
    chosen = found + negatives[::-1].cumsum()[::-1]
    whole = positives.sum()
    precision = found / np.where(chosen == 0, 1.0, chosen)
    return float((positives * precision).sum() / whole) if whole else math.nan


def mean_of_defined(values: list[float]) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


class Ranking(Metric):
    """A score of how well the rows of a class are told from the rest by their scores.

    Takes one logit (or probability) per row, two logits, or logits of more classes. Then it is the
    mean over the classes, each against the rest by its softmax probability; classes for which it
    is not defined are left out. NaN where no class is left, or a score is NaN.

    Args:
        name: key in logs.
    """

    higher_is_better = True
    collects = True

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def score(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The score from weights of positives and negatives by rising level; NaN: undefined."""

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Scores, labels and weights, a row for every label."""
        _, truth, size = labels(self.name, outputs, targets)
        if is_binary(outputs):
            scores = outputs.reshape(-1)
        elif size == 2:
            scores = (outputs[..., 1] - outputs[..., 0]).reshape(-1)
        else:
            scores = outputs.reshape(-1, size)
        return {
            "scores": scores,
            "labels": mx.where(valid(truth, size), truth, mx.nan).reshape(-1),
            "weights": per_element(weights, truth.shape).reshape(-1),
        }

    def compute(self, state: HostState) -> float | None:
        """A score in [0, 1]."""
        counts = state["weights"] != 0
        scores, truth, weights = (state[key][counts] for key in ("scores", "labels", "weights"))
        if not len(weights):
            return None
        if np.isnan(scores).any() or np.isnan(truth).any():
            return math.nan
        if scores.ndim == 1:
            return self._by_level(scores, truth == 1, weights)
        odds = np.exp(scores - scores.max(1, keepdims=True))
        shares = odds / odds.sum(1, keepdims=True)
        return mean_of_defined(
            [self._by_level(share, truth == c, weights) for c, share in enumerate(shares.T)]
        )

    def _by_level(self, scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
        levels, level = np.unique(scores, return_inverse=True)
        return self.score(
            np.bincount(level, weights * positive, len(levels)),
            np.bincount(level, weights * ~positive, len(levels)),
        )


class AUROC(Ranking):
    """Area under the receiver operating characteristic: does a positive outscore a negative?

    It is the weighted share of pairs of a positive and a negative row where the positive has the
    higher score, ties counting one half (Hanley and McNeil 1982): exact, not binned. It therefore
    keeps the scores of all rows until the value is read; :class:`~mlx_fit.metrics.BinnedAUROC`
    keeps counts instead. See :class:`Ranking` for what it takes; a class without a positive or a
    negative row is left out.

    Args:
        name: key in logs.
    """

    def __init__(self, name: str = "auroc") -> None:
        super().__init__(name)

    def score(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The share of pairs in order."""
        return roc_area(positives, negatives)


class AveragePrecision(Ranking):
    """Average precision: the area under the precision-recall curve, as a sum of steps.

    It is the mean over the positive rows of the precision among the rows that score at least as
    high, which is scikit-learn's definition, without interpolation. Exact: it keeps the scores of
    all rows until the value is read; :class:`~mlx_fit.metrics.BinnedAveragePrecision` keeps counts
    instead. See :class:`Ranking` for what it takes; a class without a positive row is left out.

    Args:
        name: key in logs.
    """

    def __init__(self, name: str = "average_precision") -> None:
        super().__init__(name)

    def score(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The mean precision at the positives."""
        return average_precision(positives, negatives)
