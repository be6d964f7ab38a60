"""Weights by class, for unbalanced labels. Imports layer 2: data.arrays."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_fit.data.arrays import is_array, is_named_tuple, to_numpy
from mlx_fit.errors import ConfigurationError

__all__ = ["ClassWeights"]


class ClassWeights:
    """Multiplies the weights of a batch by a weight for each row's class.

    Labels are read on the host: integers of shape ``(batch,)`` or ``(batch, 1)`` (floats are
    rounded), or one-hot rows of shape ``(batch, classes)``.

    Args:
        class_weight: class -> weight. Classes that it lacks weigh 1. Keys may be strings of digits,
            as JSON has them.

    Raises:
        ConfigurationError: ``class_weight`` is no dict from integers to finite weights >= 0.

    Example:
        >>> import numpy as np
        >>> weigh = ClassWeights({0: 2.0, 1: 1.0})
        >>> x, y, weights = weigh((np.zeros((4, 3)), np.array([0, 1, 2, 1])))
        >>> weights.tolist()
        [2.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, class_weight: Mapping[Any, float]) -> None:
        if not isinstance(class_weight, Mapping):
            raise ConfigurationError(
                f"class_weight is a {type(class_weight).__name__}; expected a dict from class to "
                "weight, such as {0: 1.0, 1: 5.0}."
            )
        weights: dict[int, float] = {}
        for key, weight in class_weight.items():
            label = _label(key)
            if label in weights:
                raise ConfigurationError(f"class_weight has two weights for class {label}.")
            weights[label] = _weight(key, weight)
        self._labels = np.array(sorted(weights), dtype=np.int64)
        self._weights = np.array([weights[label] for label in sorted(weights)], dtype=np.float32)

    def __call__(self, batch: Any) -> tuple[Any, Any, np.ndarray] | None:
        """``(x, y)`` or ``(x, y, weights)`` as ``(x, y, weights)``, with float32 weights.

        None, where another rank has all rows of a batch, stays None.

        Raises:
            ConfigurationError: the batch has no ``y``, or several.
        """
        if batch is None:
            return None
        if not isinstance(batch, tuple | list) or is_named_tuple(batch) or not 2 <= len(batch) <= 3:
            raise ConfigurationError(
                f"class_weight needs batches (x, y) or (x, y, weights), not a "
                f"{type(batch).__name__}. Weigh the rows in the data instead."
            )
        y = batch[1]
        if not is_array(y):
            raise ConfigurationError(
                f"class_weight needs a single array of labels, but y is a {type(y).__name__}: with "
                "several outputs, weigh the rows in the data instead."
            )
        weights = self._of(_classes(to_numpy(y)))
        if len(batch) == 3 and batch[2] is not None:
            given = to_numpy(batch[2]).astype(np.float32)
            weights = given * weights.reshape(-1, *[1] * (given.ndim - 1))
        return batch[0], y, weights

    def _of(self, classes: np.ndarray) -> np.ndarray:
        if not self._labels.size:
            return np.ones(len(classes), dtype=np.float32)
        nearest = np.searchsorted(self._labels, classes).clip(max=len(self._labels) - 1)
        return np.where(self._labels[nearest] == classes, self._weights[nearest], np.float32(1))


def _classes(y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] > 1:
        return y.argmax(axis=1)
    if y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1):
        return np.rint(y.reshape(-1)).astype(np.int64)
    raise ConfigurationError(
        f"class_weight needs labels of shape (batch,) or (batch, 1), or one-hot rows "
        f"(batch, classes), but y has shape {y.shape}."
    )


def _label(key: Any) -> int:
    try:
        return int(key) if isinstance(key, str) else operator.index(key)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"class_weight has the key {key!r}; expected classes as integers."
        ) from None


def _weight(key: Any, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigurationError(
            f"class_weight[{key!r}] is {weight!r}; expected a finite number >= 0."
        )
    return number
