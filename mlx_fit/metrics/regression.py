"""Metrics of real values. Several outputs are averaged uniformly."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_fit.metrics.base import (
    HostState,
    Metric,
    State,
    core,
    mean,
    per_element,
    shape_error,
    weighted,
)


def errors(name: str, outputs: mx.array, targets: mx.array) -> mx.array:
    """``outputs - targets`` in the outputs' shape: (N, 1) less (N,) would broadcast to (N, N).

    Raises:
        DataError: the shapes differ by more than trailing axes of length 1.
    """
    if core(targets.shape) != core(outputs.shape):
        raise shape_error(name, outputs, targets, "the same shape, trailing axes of length 1 apart")
    return outputs - targets.reshape(outputs.shape).astype(outputs.dtype)


class MAE(Metric):
    """Mean absolute error.

    Args:
        name: key in logs.

    Example:
        >>> import mlx.core as mx
        >>> MAE().update(mx.array([[1.0], [2.0]]), mx.array([0, 4]), mx.ones(2))
        {'sum': array(3, dtype=float32), 'weight': array(2, dtype=float32)}
    """

    higher_is_better = False

    def __init__(self, name: str = "mae") -> None:
        self.name = name

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weighted absolute errors, and weights."""
        return weighted(self.name, mx.abs(errors(self.name, outputs, targets)), weights)

    def compute(self, state: HostState) -> float | None:
        """In the targets' unit."""
        return mean(state)


class MSE(Metric):
    """Mean squared error.

    Args:
        name: key in logs.
    """

    higher_is_better = False

    def __init__(self, name: str = "mse") -> None:
        self.name = name

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weighted squared errors, and weights."""
        return weighted(self.name, mx.square(errors(self.name, outputs, targets)), weights)

    def compute(self, state: HostState) -> float | None:
        """In the targets' unit, squared."""
        return mean(state)


class RMSE(Metric):
    """Root of the mean squared error over all rows and outputs.

    Args:
        name: key in logs.
    """

    higher_is_better = False

    def __init__(self, name: str = "rmse") -> None:
        self.name = name

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weighted squared errors, and weights."""
        return weighted(self.name, mx.square(errors(self.name, outputs, targets)), weights)

    def compute(self, state: HostState) -> float | None:
        """In the targets' unit."""
        square = mean(state)
        return None if square is None else math.sqrt(square)


class R2(Metric):
    """Coefficient of determination: 1 less squared errors over the targets' squared deviations.

    An output whose targets do not vary scores 1 if it is predicted exactly, else 0, as in
    scikit-learn. Axes beyond the weights' are separate outputs; their scores are averaged.

    Sums of squares would lose all digits in float32 where the targets' mean is far from 0. So each
    batch is one row of weight, mean and squared deviations from that mean, and the rows are merged
    in float64 (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").

    Args:
        name: key in logs.
    """

    higher_is_better = True
    collects = True

    def __init__(self, name: str = "r2") -> None:
        self.name = name

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """One row: the batch's weight; per output the targets' mean in two parts, and squares."""
        wrong = errors(self.name, outputs, targets)
        targets = targets.reshape(outputs.shape).astype(mx.float32)
        num_axes = min(weights.ndim, targets.ndim)
        weights = per_element(weights, targets.shape[:num_axes]).reshape(-1, 1)
        counts = weights != 0
        targets = mx.where(counts, targets.reshape(weights.size, -1), 0)
        wrong = mx.where(counts, wrong.reshape(weights.size, -1), 0)
        weight = weights.sum()
        divisor = mx.where(weight > 0, weight, 1)
        center = (weights * targets).sum(0) / divisor
        deviations = targets - center
        # The center is rounded; how far it is off the mean follows from the deviations.
        shift = (weights * deviations).sum(0) / divisor
        return {
            "weight": weight[None],
            "center": center[None],
            "shift": shift[None],
            "deviations": ((weights * mx.square(deviations)).sum(0) - weight * shift**2)[None],
            "errors": (weights * mx.square(wrong)).sum(0)[None],
        }

    def compute(self, state: HostState) -> float | None:
        """At most 1; 0 is what the targets' mean would score."""
        weights, means = state["weight"][:, None], state["center"] + state["shift"]
        weight = float(weights.sum())
        if not weight:
            return None
        center = (weights * means).sum(0) / weight
        between = (weights * (means - center) ** 2).sum(0)
        deviations = state["deviations"].sum(0) + between
        squares = state["errors"].sum(0)
        # Targets that vary by less than float32 resolves do not vary.
        constant = deviations <= weight * (np.finfo(np.float32).eps * center) ** 2
        share = squares / np.where(constant, 1.0, deviations)
        return float(np.where(constant, squares == 0, 1.0 - share).mean())
