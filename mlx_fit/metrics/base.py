"""What a metric is, and how values and weights become sums."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError, DataError

State = dict[str, mx.array]
HostState = dict[str, np.ndarray]


class Metric(ABC):
    """A quantity that is watched: additive sums on the device, one value on the host.

    A metric keeps nothing between calls, so that one object can serve several trainers: the trainer
    adds the states of batches, micro-batches and ranks, and computes the value when it is read.

    Attributes:
        name: its key in logs and history.
        higher_is_better: the direction for monitors; None: nobody declared one.
        collects: False: states are added. True: the entries are rows, concatenated along their
            first axis.

    Example:
        >>> import mlx.core as mx
        >>> class Bias(Metric):
        ...     name = "bias"
        ...
        ...     def update(self, outputs, targets, weights):
        ...         return weighted(self.name, outputs - targets, weights)
        ...
        ...     def compute(self, state):
        ...         return mean(state)
        >>> Bias().update(mx.array([1.0, 2.0]), mx.array([0.0, 0.0]), mx.array([1.0, 3.0]))
        {'sum': array(7, dtype=float32), 'weight': array(4, dtype=float32)}
    """

    name: str
    higher_is_better: bool | None = None
    collects: bool = False

    @abstractmethod
    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """The state of one batch: float32 arrays of fixed shape, or rows if ``collects``.

        Runs inside the compiled step: shapes may be looked at, values not.

        Args:
            outputs: what the model returned, float32, shape ``(batch, ...)``.
            targets: as in the data, except that ignored labels are 0.
            weights: float32, shape ``(batch,)`` or with more of the targets' axes; 0 where the
                target does not count.
        """

    @abstractmethod
    def compute(self, state: HostState) -> float | np.ndarray | dict[str, list[float]] | None:
        """The value of a (summed or concatenated) state, or None if its total weight is 0.

        Monitors can watch a number only; matrices and dicts of lists are logged and drawn.

        Args:
            state: float64 arrays under the names that :meth:`update` gave them.
        """


class _Marked(threading.local):
    """Weights that are known to be 1 everywhere, in this thread."""

    weights: mx.array | None = None


_each_once = _Marked()


@contextmanager
def each_counts_once(weights: mx.array) -> Iterator[None]:
    """Say that these weights are all 1, so that :func:`weighted` leaves out work of no effect.

    Nobody can see that of an array inside a compiled step, and most batches have no weights.
    """
    _each_once.weights = weights
    try:
        yield
    finally:
        _each_once.weights = None


class Mean(Metric):
    """The weighted mean of a function's values.

    Args:
        function: ``f(outputs, targets)``, giving values of shape ``(batch, ...)``, or a scalar
            mean, which weighs as much as its batch. Its attribute ``higher_is_better``, if it has
            one, is the metric's direction.
        name: default: the function's name.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.higher_is_better = getattr(function, "higher_is_better", None)
        self.function = function

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Sum of the function's values times their weights, and sum of the weights."""
        values = self.function(outputs, targets)
        if not isinstance(values, mx.array):
            raise ConfigurationError(
                f"The metric {self.name!r} returned {values!r}; expected an mx.array: one value a "
                "row, or a scalar mean. Inside the compiled step there is no .item()."
            )
        return weighted(self.name, values, weights)

    def compute(self, state: HostState) -> float | None:
        """Sum over weight."""
        return mean(state)


def weighted(name: str, values: mx.array, weights: mx.array) -> State:
    """``{"sum": sum(weights * values), "weight": sum(weights)}``, for :func:`mean` to divide.

    Args:
        name: the metric's, for messages.
        values: shape ``(batch, ...)``, or a scalar. Axes beyond the weights' are averaged first;
            where the weights have more axes, a value weighs their sum.
        weights: shape ``(batch, ...)``. Values of weight 0 do not count, not even NaN.

    Raises:
        DataError: the shapes do not fit together.
    """
    shape = values.shape
    values = values.astype(mx.float32).reshape(core(shape))
    if values.ndim > weights.ndim:
        values = values.mean(tuple(range(weights.ndim, values.ndim)))
    is_plain = weights is _each_once.weights
    weights = _sum_beyond(weights, values.ndim)
    if values.shape != weights.shape:
        raise DataError(
            f"The metric {name!r} gave values of shape {shape} for weights whose leading axes are "
            f"{weights.shape}; expected one value a row, shape (batch, ...), or a scalar mean."
        )
    if is_plain and values.ndim == 1:
        return {"sum": total(values), "weight": mx.array(float(values.size))}
    return {"sum": total(mx.where(weights != 0, values * weights, 0)), "weight": total(weights)}


def mean(state: HostState) -> float | None:
    """``sum / weight`` of a state from :func:`weighted`; None where nothing counted."""
    weight = float(state["weight"])
    return float(state["sum"]) / weight if weight else None


def per_element(weights: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Weights of every element of an array of ``shape``: each has the weight of its row."""
    weights = _sum_beyond(weights, len(shape))
    return mx.broadcast_to(
        weights.reshape(*weights.shape, *(1,) * (len(shape) - weights.ndim)), shape
    )


def total(array: mx.array) -> mx.array:
    """The sum, rows first: MLX's sums on CPU are naive, and long ones lose digits."""
    return array.sum(-1).sum() if array.ndim > 1 else array.sum()


def core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing axes of length 1."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def shape_error(name: str, outputs: Any, targets: Any, expected: str) -> DataError:
    """The error for outputs and targets that a metric cannot compare."""
    return DataError(
        f"The metric {name!r} got outputs of shape {outputs.shape} and targets of shape "
        f"{targets.shape}; expected {expected}. Change the model's last layer, reshape the "
        "targets, or leave the metric out.",
        field="targets",
    )


def _sum_beyond(weights: mx.array, num_axes: int) -> mx.array:
    return weights.sum(tuple(range(num_axes, weights.ndim))) if weights.ndim > num_axes else weights
