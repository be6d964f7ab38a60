"""Weighted means: what a loss weighs, and the weights that metrics see."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.sums import long_sum


def mean_loss(
    loss: mx.array,
    weights: mx.array | None,
    mask: mx.array | None,
    shape: tuple[int, ...],
) -> tuple[mx.array, mx.array | float]:
    """The mean of per-example losses, and what it weighs.

    Args:
        loss: shape ``(batch, ...)``, or a scalar mean.
        weights: shape ``(batch,)`` or with more of the loss's axes; None: all weigh 1.
        mask: 0 where a target is ignored, the shape of ``loss``; None: all count.
        shape: of what weighs 1: the rows, or all targets of a loss that may ignore some.

    Without weights the mean is that of ``mx.mean``, to the bit: ``mx.mean`` multiplies the sum by
    the float32 reciprocal of the count, and so does the masked form here.
    """
    rows = shape[0] if shape else 1
    if loss.ndim == 0:
        if weights is not None:
            raise ConfigurationError(
                "The loss returned one scalar for the whole batch, so sample weights or "
                "class_weight cannot act on its rows. Return per-example losses of shape (batch,)."
            )
        return loss, rows
    if loss.shape[0] != rows:
        raise DataError(
            f"The loss has shape {tuple(loss.shape)} for a batch of {rows} rows; expected "
            f"({rows}, ...), or a scalar mean."
        )
    if weights is None and mask is None:
        return _mean_beyond(loss, 1).mean(), math.prod(shape)
    weights = _element_weights(loss, weights, mask)
    weighted = _mean_beyond(loss, weights.ndim) * weights
    total = long_sum(weights)
    each = max(math.prod(shape) // weights.size, 1)  # targets that a weight stands for
    return long_sum(weighted) * reciprocal(total), total * each


def metric_weights(
    weights: mx.array | None, mask: mx.array | None, shape: tuple[int, ...]
) -> mx.array:
    """The weights that metrics see: ones where the user gave none, 0 where a target is ignored."""
    if mask is None:
        if weights is not None and len(shape) == 1:
            return _drop_unit_axes(weights, shape[0])
        mask = mx.ones(shape)
    return _element_weights(mask, weights, mask)


def _element_weights(values: mx.array, weights: mx.array | None, mask: mx.array | None) -> mx.array:
    if weights is None:
        assert mask is not None
        return mask
    weights = _drop_unit_axes(weights, values.shape[0])
    if tuple(weights.shape) != tuple(values.shape[: weights.ndim]):
        raise DataError(
            f"weights have shape {tuple(weights.shape)}, losses {tuple(values.shape)}; expected "
            f"one weight a row, shape ({values.shape[0]},), or the leading axes of the losses.",
            field="weights",
        )
    if mask is None:
        return weights
    return weights.reshape(*weights.shape, *(1,) * (mask.ndim - weights.ndim)) * mask


def _drop_unit_axes(weights: mx.array, rows: int) -> mx.array:
    weights = weights.astype(mx.float32)
    return weights.reshape(rows) if weights.size == rows and weights.ndim > 1 else weights


def _mean_beyond(values: mx.array, num_axes: int) -> mx.array:
    return values.mean(tuple(range(num_axes, values.ndim))) if values.ndim > num_axes else values


def reciprocal(weight: mx.array | float) -> mx.array | float:
    """``1 / weight``, and a finite number where there is none: what it multiplies is 0 then."""
    if isinstance(weight, mx.array):
        weight = weight.astype(mx.float32)
        return 1.0 / mx.where(weight > 0, weight, 1.0)
    return 1.0 / weight if weight > 0 else 0.0


def sum_of_counted(weights: np.ndarray, counts: np.ndarray) -> float:
    """The weights of targets that are not ignored. A clash of shapes is left to the trace."""
    if weights.shape != counts.shape[: weights.ndim]:
        return float(weights.sum())
    return float((weights * counts.reshape(*weights.shape, -1).any(-1)).sum())


def host_sum(weights: Any) -> float | None:
    """The sum of a batch's weights; 1 where there are none, None where only the device knows it."""
    if weights is None:
        return 1.0
    if isinstance(weights, mx.array):
        return None
    weights = np.asarray(weights)
    if not (weights >= 0).all():
        row = int(np.argwhere(~(weights >= 0))[0][0])
        raise DataError(
            f"The weights of row {row} of the batch are {weights[row]}; expected numbers of at "
            "least 0.",
            field="weights",
            index=row,
        )
    return float(weights.sum())
