"""Metrics of the order of scores."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_fit.metrics.base import HostState, Metric, State, per_element
from mlx_fit.metrics.classification import is_binary, labels, valid


class AUROC(Metric):
    """Area under the receiver operating characteristic: does a positive outscore a negative?

    It is the weighted share of pairs of a positive and a negative row where the positive has the
    higher score, ties counting one half (Hanley and McNeil 1982): exact, not binned. It therefore
    keeps the scores of all rows until the value is read.

    Takes one logit (or probability) per row, two logits, or logits of more classes. Then it is the
    mean over the classes, each against the rest by its softmax probability; classes without a
    positive or a negative row are left out. NaN where no class is left, or a score is NaN.

    Args:
        name: key in logs.
    """

    higher_is_better = True
    collects = True

    def __init__(self, name: str = "auroc") -> None:
        self.name = name

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
        """An area in [0, 1]; one half is what chance scores."""
        counts = state["weights"] != 0
        scores, truth, weights = (state[key][counts] for key in ("scores", "labels", "weights"))
        if not len(weights):
            return None
        if np.isnan(scores).any() or np.isnan(truth).any():
            return math.nan
        if scores.ndim == 1:
            return _area(scores, truth == 1, weights)
        odds = np.exp(scores - scores.max(1, keepdims=True))
        shares = odds / odds.sum(1, keepdims=True)
        areas = [_area(share, truth == c, weights) for c, share in enumerate(shares.T)]
        defined = [area for area in areas if not math.isnan(area)]
        return math.fsum(defined) / len(defined) if defined else math.nan


def _area(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """The area for one class; NaN if all rows are positive, or none is."""
    levels, level = np.unique(scores, return_inverse=True)
    positives = np.bincount(level, weights * positive, len(levels))
    negatives = np.bincount(level, weights * ~positive, len(levels))
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else math.nan
