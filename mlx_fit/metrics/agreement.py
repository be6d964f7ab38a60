"""Metrics of how far predicted and true classes agree: correlation, kappa, overlap."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError
from mlx_fit.metrics.base import HostState, Metric, State, per_element
from mlx_fit.metrics.classification import ClassScore, ConfusionMatrix, labels, quotient, tally

Weighting = Literal["linear", "quadratic"]


class ClassCounts(Metric):
    """A score made of the counts of all classes: with one logit per row of both, 0 and 1.

    Args:
        threshold: a single logit above it means class 1. 0 is a probability of one half; use 0.5
            if the model ends in a sigmoid.
        name: key in logs.
    """

    higher_is_better = True

    def __init__(self, threshold: float, name: str) -> None:
        self.name = name
        self.threshold = threshold

    @abstractmethod
    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> float:
        """The score from weights of true positives, of predictions and of occurrences."""

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weights of hits, predictions and occurrences per class."""
        predicted, truth, size = labels(self.name, outputs, targets, self.threshold)
        weights = per_element(weights, truth.shape)
        return {
            "hits": tally(predicted, mx.where(predicted == truth, weights, 0), size),
            "predicted": tally(predicted, weights, size),
            "actual": tally(truth, weights, size),
        }

    def compute(self, state: HostState) -> float | None:
        """One number; NaN where there was a label that does not exist."""
        hits, predicted, actual = (state[key] for key in ("hits", "predicted", "actual"))
        return self.score(hits, predicted, actual) if actual.any() else None


class MCC(ClassCounts):
    """Matthews correlation coefficient of predicted and true classes.

    Over several classes it is R_K (Gorodkin 2004), which scikit-learn computes as well. 0 where
    all predictions or all targets are of one class.

    Args:
        threshold: a single logit above it means class 1.
        name: key in logs.

    Example:
        >>> import mlx.core as mx
        >>> import numpy as np
        >>> state = MCC().update(mx.array([2.0, -1.0, 1.0]), mx.array([1, 0, 0]), mx.ones(3))
        >>> MCC().compute({key: np.array(sums, np.float64) for key, sums in state.items()})
        0.5
    """

    def __init__(self, threshold: float = 0.0, name: str = "mcc") -> None:
        super().__init__(threshold, name)

    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> float:
        """A correlation in [-1, 1]."""
        size, size_true = predicted.sum(), actual.sum()
        covariance = hits.sum() * size - predicted @ actual
        spread = size**2 - predicted @ predicted
        spread_true = size_true**2 - actual @ actual
        product = float(spread * spread_true)
        if math.isnan(product):
            return math.nan
        return float(covariance / math.sqrt(product)) if product > 0 else 0.0


class MeanIoU(ClassCounts):
    """Mean intersection over union: of all rows where a class is predicted or true, those of both.

    Counts are added over all batches and divided once, as in segmentation benchmarks; it is no
    mean over images. The mean is over the classes that occur in truth or predictions, and with one
    logit per row over class 0 and class 1. :class:`IoU` scores classes one by one.

    Args:
        threshold: a single logit above it means class 1.
        name: key in logs.
    """

    def __init__(self, threshold: float = 0.0, name: str = "mean_iou") -> None:
        super().__init__(threshold, name)

    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> float:
        """A share in [0, 1]."""
        union = predicted + actual - hits
        return float(quotient(hits, union)[predicted + actual != 0].mean())


class IoU(ClassScore):
    """Intersection over union (Jaccard index) of each class; see :class:`ClassScore`.

    Args:
        average: as for :class:`ClassScore`.
        threshold: a single logit above it means class 1.
        name: key in logs.
    """

    def __init__(
        self,
        average: Literal["macro", "micro", "weighted"] | None = "macro",
        threshold: float = 0.0,
        name: str = "iou",
    ) -> None:
        super().__init__(average, threshold, name)

    def score(self, hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
        """Hits over what is predicted or occurs."""
        return quotient(hits, predicted + actual - hits)


class CohenKappa(Metric):
    """Cohen's kappa: agreement beyond what the frequencies of classes give by chance.

    0 where chance alone would give full agreement: all predictions and targets of one class.

    Args:
        weighting: how much a disagreement costs: None: all the same; ``"linear"``, the distance of
            the classes; ``"quadratic"``, its square (Cohen 1968), for classes in order.
        threshold: a single logit above it means class 1.
        name: key in logs.

    Raises:
        ConfigurationError: ``weighting`` is something else.
    """

    higher_is_better = True

    def __init__(
        self,
        weighting: Weighting | None = None,
        threshold: float = 0.0,
        name: str = "cohen_kappa",
    ) -> None:
        if weighting not in ("linear", "quadratic", None):
            raise ConfigurationError(
                f"weighting={weighting!r} is unknown; expected 'linear', 'quadratic' or None."
            )
        self.name = name
        self.weighting = weighting
        self._pairs = ConfusionMatrix(threshold, name)

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """The confusion matrix of one batch, shape ``(classes, classes)``."""
        return self._pairs.update(outputs, targets, weights)

    def compute(self, state: HostState) -> float | None:
        """At most 1; below 0 where there is less agreement than by chance."""
        matrix = self._pairs.compute(state)
        if matrix is None:
            return None
        place = np.arange(len(matrix))
        distance = np.abs(place[:, None] - place)
        power = {None: 0, "linear": 1, "quadratic": 2}[self.weighting]
        cost = np.where(distance == 0, 0, distance**power)
        actual, predicted = matrix.sum(1), matrix.sum(0)
        by_chance = float((cost * np.outer(actual, predicted)).sum() / matrix.sum())
        if math.isnan(by_chance):
            return math.nan
        return 1 - float((cost * matrix).sum()) / by_chance if by_chance else 0.0
