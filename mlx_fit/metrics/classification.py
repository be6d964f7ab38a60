"""Metrics of class labels: predictions against truth."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.errors import ConfigurationError
from mlx_fit.metrics.base import (
    HostState,
    Metric,
    State,
    core,
    mean,
    per_element,
    shape_error,
    total,
    weighted,
)

Average = Literal["macro", "micro", "weighted"]


def is_binary(outputs: mx.array) -> bool:
    """Whether there is one logit per decision: shape ``(batch,)`` or ``(batch, ..., 1)``."""
    return outputs.ndim == 1 or outputs.shape[-1] == 1


def labels(
    name: str, outputs: mx.array, targets: mx.array, threshold: float = 0.0
) -> tuple[mx.array, mx.array, int]:
    """Predicted labels, true labels (both int32, of one shape) and the number of classes.

    Args:
        name: the metric's, for messages.
        outputs: one logit per decision, or logits over the last axis, where the largest wins.
        targets: labels; or, over several classes, one-hot rows or probabilities.
        threshold: a single logit above it means class 1.

    Raises:
        DataError: the shapes do not fit together.
    """
    if is_binary(outputs):
        if core(targets.shape) != core(outputs.shape):
            raise shape_error(name, outputs, targets, "one target per output")
        truth = targets.astype(mx.float32).reshape(outputs.shape) > 0.5
        return (outputs > threshold).astype(mx.int32), truth.astype(mx.int32), 2
    predicted = mx.argmax(outputs, -1).astype(mx.int32)
    if targets.shape == outputs.shape:
        truth = mx.argmax(targets, -1)
    elif core(targets.shape) == core(predicted.shape):
        truth = targets.reshape(predicted.shape)
    else:
        expected = f"class indices of shape {predicted.shape}, or one-hot rows like the outputs"
        raise shape_error(name, outputs, targets, expected)
    return predicted, truth.astype(mx.int32), outputs.shape[-1]


def valid(index: mx.array, size: int) -> mx.array:
    """Which labels exist. Others must not be indexed with: MLX does not check bounds."""
    return (index >= 0) & (index < size)


def tally(index: mx.array, weights: mx.array, size: int) -> mx.array:
    """Sum of weights per label, shape ``(size,)``; a label that does not exist makes it all NaN."""
    exists = valid(index, size)
    weights = mx.where(exists | (weights == 0), weights, mx.nan)
    sums = mx.zeros(size).at[mx.where(exists, index, 0)].add(weights)
    return sums + 0 * total(weights)


class Accuracy(Metric):
    """The share of right predictions.

    Takes logits over the last axis with class labels, one-hot rows or probabilities; or one logit
    per row with binary targets.

    Args:
        threshold: a single logit above it means class 1. 0 is a probability of one half; use 0.5
            if the model ends in a sigmoid.
        name: key in logs.

    Example:
        >>> import mlx.core as mx
        >>> logits, targets = mx.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), mx.array([0, 1, 1])
        >>> Accuracy().update(logits, targets, mx.ones(3))
        {'sum': array(2, dtype=float32), 'weight': array(3, dtype=float32)}
    """

    higher_is_better = True

    def __init__(self, threshold: float = 0.0, name: str = "accuracy") -> None:
        self.name = name
        self.threshold = threshold

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weight of the right predictions, and of all."""
        predicted, truth, _ = labels(self.name, outputs, targets, self.threshold)
        return weighted(self.name, predicted == truth, weights)

    def compute(self, state: HostState) -> float | None:
        """A share in [0, 1]."""
        return mean(state)


class TopKAccuracy(Metric):
    """The share of rows whose true class is among the ``k`` largest logits.

    Of equal logits the lower class counts as larger, so that ``k=1`` is :class:`Accuracy`.

    Args:
        k: how many guesses a row has.
        name: key in logs; default ``"top_<k>_accuracy"``.

    Raises:
        ConfigurationError: ``k`` is below 1, or above the number of classes (when first used).
    """

    higher_is_better = True

    def __init__(self, k: int = 5, name: str | None = None) -> None:
        if k < 1:
            raise ConfigurationError(f"k={k} must be at least 1.")
        self.name = name or f"top_{k}_accuracy"
        self.k = k

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weight of the rows that have their class among the first ``k``, and of all."""
        if is_binary(outputs) or outputs.shape[-1] < self.k:
            raise ConfigurationError(
                f"The metric {self.name!r} got outputs of shape {outputs.shape}, which have fewer "
                f"than {max(self.k, 2)} classes on the last axis. Lower k, or use 'accuracy'."
            )
        _, truth, num_classes = labels(self.name, outputs, targets)
        exists = valid(truth, num_classes)
        truth = mx.where(exists, truth, 0)[..., None]
        logit = mx.take_along_axis(outputs, truth, -1)
        ahead = (outputs > logit) | ((outputs == logit) & (mx.arange(num_classes) < truth))
        # Nothing is ahead of NaN, which must not make it right.
        right = (ahead.sum(-1) < self.k) & exists & ~mx.isnan(logit).squeeze(-1)
        return weighted(self.name, right, weights)

    def compute(self, state: HostState) -> float | None:
        """A share in [0, 1]."""
        return mean(state)


class ClassScore(Metric):
    """A score made of each class's true positives, predictions and occurrences.

    With one logit per row it is the score of class 1, otherwise each class is scored against the
    rest. A quotient of 0 by 0 is 0.

    Args:
        average: over several classes: ``"macro"``, the mean over the classes that occur in truth or
            predictions (as scikit-learn does); ``"micro"``, the score of the summed counts;
            ``"weighted"``, the mean weighted by occurrence; None: one score per class.
        threshold: a single logit above it means class 1.
        name: key in logs.

    Raises:
        ConfigurationError: ``average`` is something else.
    """

    def __init__(self, average: Average | None, threshold: float, name: str) -> None:
        if average not in ("macro", "micro", "weighted", None):
            raise ConfigurationError(
                f"average={average!r} is unknown; expected 'macro', 'micro', 'weighted' or None."
            )
        self.name = name
        self.higher_is_better = None if average is None else True
        self.average = average
        self.threshold = threshold

    @abstractmethod
    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
        """The score from weights of true positives, of predictions and of occurrences."""

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weights of hits, predictions and occurrences per class (of class 1 with one logit)."""
        predicted, truth, size = labels(self.name, outputs, targets, self.threshold)
        weights = per_element(weights, truth.shape)
        hits = mx.where(predicted == truth, weights, 0)
        state = {
            "hits": tally(predicted, hits, size),
            "predicted": tally(predicted, weights, size),
            "actual": tally(truth, weights, size),
        }
        if is_binary(outputs):
            state = {key: sums[1] for key, sums in state.items()}
        return state | {"weight": total(weights)}

    def compute(self, state: HostState) -> float | np.ndarray | None:
        """A score in [0, 1], or an array of one per class."""
        if state["weight"] == 0:
            return None
        hits, predicted, actual = (np.asarray(state[k]) for k in ("hits", "predicted", "actual"))
        if self.average == "micro":
            hits, predicted, actual = hits.sum(), predicted.sum(), actual.sum()
        scores = self.score(hits, predicted, actual)
        if scores.ndim == 0:
            return float(scores)
        if self.average is None:
            return scores
        if self.average == "weighted":
            return float((scores * actual).sum() / actual.sum())
        return float(scores[predicted + actual != 0].mean())


class Precision(ClassScore):
    """The share of a class's predictions that are right; see :class:`ClassScore`."""

    def __init__(
        self, average: Average | None = "macro", threshold: float = 0.0, name: str = "precision"
    ) -> None:
        super().__init__(average, threshold, name)

    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
        """Hits over predictions."""
        return quotient(hits, predicted)


class Recall(ClassScore):
    """The share of a class's occurrences that are found; see :class:`ClassScore`."""

    def __init__(
        self, average: Average | None = "macro", threshold: float = 0.0, name: str = "recall"
    ) -> None:
        super().__init__(average, threshold, name)

    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
        """Hits over occurrences."""
        return quotient(hits, actual)


class F1(ClassScore):
    """The harmonic mean of precision and recall; see :class:`ClassScore`."""

    def __init__(
        self, average: Average | None = "macro", threshold: float = 0.0, name: str = "f1"
    ) -> None:
        super().__init__(average, threshold, name)

    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
        """Twice the hits over predictions plus occurrences."""
        return quotient(2 * hits, predicted + actual)


class ConfusionMatrix(Metric):
    """Weights of all pairs of true class (rows) and predicted class (columns).

    Args:
        threshold: a single logit above it means class 1.
        name: key in logs.
    """

    def __init__(self, threshold: float = 0.0, name: str = "confusion_matrix") -> None:
        self.name = name
        self.threshold = threshold

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """The matrix of one batch, shape ``(classes, classes)``."""
        predicted, truth, size = labels(self.name, outputs, targets, self.threshold)
        weights = per_element(weights, truth.shape)
        pairs = tally(truth * size + predicted, weights, size * size)
        return {"matrix": pairs.reshape(size, size)}

    def compute(self, state: HostState) -> np.ndarray | None:
        """The matrix, in float64."""
        return state["matrix"] if state["matrix"].any() else None


class Perplexity(Metric):
    """``exp`` of the weighted mean cross-entropy of logits over the last axis.

    Args:
        name: key in logs.
    """

    higher_is_better = False

    def __init__(self, name: str = "perplexity") -> None:
        self.name = name

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weighted cross-entropy, and weights."""
        if is_binary(outputs):
            raise shape_error(self.name, outputs, targets, "outputs of shape (batch, ..., classes)")
        _, truth, size = labels(self.name, outputs, targets)
        if targets.shape == outputs.shape:
            return weighted(self.name, nn.losses.cross_entropy(outputs, targets), weights)
        exists = valid(truth, size)
        losses = nn.losses.cross_entropy(outputs, mx.where(exists, truth, 0))
        return weighted(self.name, mx.where(exists, losses, mx.nan), weights)

    def compute(self, state: HostState) -> float | None:
        """At least 1 for class labels; infinite where float64 overflows."""
        entropy = mean(state)
        if entropy is None:
            return None
        return math.inf if entropy > 709 else math.exp(entropy)


def quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, and 0 of 0 by 0."""
    return np.where(whole == 0, 0.0, part / np.where(whole == 0, 1.0, whole))
