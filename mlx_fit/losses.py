"""Losses: one value per example, reduced by the trainer, so that weights and masks can enter.

A :class:`Loss` pairs a function of ``(outputs, targets)`` with the label that does not count. The
trainer asks for it by name (``loss="cross_entropy"``) or gets one from a factory that takes
parameters (``loss=CrossEntropy(label_smoothing=0.1)``). Each agrees with the loss of that name in
PyTorch, except that classes are on the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.errors import ConfigurationError, DataError

__all__ = ["NLL", "BinaryCrossEntropy", "CrossEntropy", "Huber", "KLDiv", "Loss", "SmoothL1", "get"]

LossFunction = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Loss:
    """A loss before its reduction.

    Attributes:
        name: what it is called in messages.
        function: ``f(outputs, targets)``, giving losses of shape ``(batch, ...)`` or a scalar mean.
        ignore_index: integer targets of this value do not count. None: all of them count.
        class_indices: integer targets choose from the outputs' last axis, unless they have the
            outputs' own shape and so are probabilities.
        takes_trees: outputs and targets may be trees of arrays, which ``function`` takes apart.

    Example:
        >>> import mlx.core as mx
        >>> loss = CrossEntropy(ignore_index=-1)
        >>> logits, targets = mx.zeros((3, 2)), mx.array([0, -1, 1])
        >>> loss(logits, targets)
        array([0.693147, 0, 0.693147], dtype=float32)
        >>> loss.mask(targets)
        array([1, 0, 1], dtype=float32)
    """

    name: str
    function: LossFunction
    ignore_index: int | None = None
    class_indices: bool = False
    takes_trees: bool = False

    def __call__(self, outputs: mx.array, targets: mx.array) -> mx.array:
        """Losses of shape ``(batch, ...)``, exactly 0 (value and gradient) at ignored targets.

        Args:
            outputs: what the model returned, float32.
            targets: what it should have returned.

        Raises:
            DataError: the shapes or dtypes do not fit together.
            ConfigurationError: ``function`` reduced away the positions that ``ignore_index`` needs.
        """
        counts = self._counts(targets, outputs)
        if counts is None:
            return self.function(outputs, targets)
        # Before anything is indexed: MLX gathers out of bounds without a word.
        losses = self.function(outputs, mx.where(counts, targets, 0))
        if losses.size != counts.size:
            raise ConfigurationError(
                f"The loss {self.name!r} gave shape {losses.shape} for targets of shape "
                f"{targets.shape}, so targets equal to ignore_index={self.ignore_index} cannot be "
                "left out. Return one loss per target, or set ignore_index=None."
            )
        return mx.where(counts.reshape(losses.shape), losses, 0)

    def mask(self, targets: mx.array, outputs: mx.array | None = None) -> mx.array | None:
        """Which targets count: float32 ones and zeros, or None if nothing can be ignored.

        Args:
            targets: integer targets may be ignored, others never.
            outputs: with them, the mask of class indices has their shape without the class axis
                (as the losses have), and targets that are probabilities are recognised.

        Returns:
            An array of the targets' shape where ``outputs`` does not say otherwise.

        Raises:
            DataError: ``outputs`` and ``targets`` do not fit together.
        """
        counts = self._counts(targets, outputs)
        if counts is None:
            return None
        if outputs is not None and self.class_indices:
            counts = _class_indices(self.name, outputs, counts)
        return counts.astype(mx.float32)

    def is_labels(self, targets: mx.array | np.ndarray, outputs: mx.array | None = None) -> bool:
        """Whether ``targets`` are class labels, which :meth:`check` can check.

        Args:
            targets: an array of the host or of the device.
            outputs: with them, integer probabilities (one-hot rows) are told from labels.
        """
        if not self.class_indices or not _is_integer(targets):
            return False
        return outputs is None or tuple(targets.shape) != tuple(outputs.shape)

    def check(self, targets: np.ndarray, num_classes: int | None) -> float:
        """Check class labels on the host, where an error can still name the row.

        Args:
            targets: the integer labels of a batch (see :meth:`is_labels`).
            num_classes: labels must be in ``[0, num_classes)``, or equal ``ignore_index``. None:
                not known yet, so that only negative labels are out of range.

        Returns:
            How many targets count.

        Raises:
            DataError: a label is out of range. ``index`` is its row.
        """
        if not targets.size:
            return 0.0
        # In the common case these two are all the work. Between steps NumPy's reductions find their
        # code out of the cache, and a short list is quicker (773 against 781 us for a whole step).
        if targets.size <= 128:
            labels = targets.ravel().tolist()
            low, high = min(labels), max(labels)
        else:
            low, high = targets.min(), targets.max()
        ignored = self.ignore_index
        in_range = low >= 0 and (num_classes is None or high < num_classes)
        if in_range and (ignored is None or not low <= ignored <= high):
            return float(targets.size)
        counts = np.ones(targets.shape, bool) if ignored is None else targets != ignored
        if not in_range:
            wrong = counts & ((targets < 0) | (targets >= (num_classes or math.inf)))
            if wrong.any():
                raise self._out_of_range(targets, wrong, num_classes)
        return float(np.count_nonzero(counts))

    def _counts(self, targets: mx.array, outputs: mx.array | None) -> mx.array | None:
        if self.ignore_index is None or not _is_integer(targets):
            return None
        if self.class_indices and not self.is_labels(targets, outputs):
            return None
        limits = mx.iinfo(targets.dtype)
        if not limits.min <= self.ignore_index <= limits.max:
            return None  # as with -100 and uint8: no target can have this value
        return targets != self.ignore_index

    def _out_of_range(
        self, targets: np.ndarray, wrong: np.ndarray, num_classes: int | None
    ) -> DataError:
        position = [int(i) for i in np.argwhere(wrong)[0]]
        label = int(targets[tuple(position)])
        allowed = "from 0 up" if num_classes is None else f"from 0 to {num_classes - 1}"
        widen = f"give the model at least {label + 1} outputs, " if label >= 0 else ""
        return DataError(
            f"targets{position} is {label}, but the loss {self.name!r} takes class labels "
            f"{allowed} (ignore_index={self.ignore_index}). Correct the label, {widen}or set "
            f"ignore_index={label} if such targets should not count.",
            field="targets",
            index=position[0],
        )


# --- Dtypes and shapes ----------------------------------------------------------------------------


def _is_integer(array: mx.array | np.ndarray) -> bool:
    if isinstance(array, np.ndarray):
        return array.dtype.kind in "iu"
    return mx.issubdtype(array.dtype, mx.integer)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing axes of length 1."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _like_outputs(name: str, outputs: mx.array, targets: mx.array) -> mx.array:
    """Targets in the outputs' shape and dtype: (N,) against (N, 1) would broadcast to (N, N)."""
    if targets.shape == outputs.shape:
        return targets.astype(outputs.dtype)
    if _core(targets.shape) != _core(outputs.shape):
        raise DataError(
            f"The loss {name!r} got outputs of shape {outputs.shape} and targets of shape "
            f"{targets.shape}; expected the same shape, trailing axes of length 1 apart. Change "
            "the model's last layer or reshape the targets; for class indices use "
            "loss='cross_entropy'.",
            field="targets",
        )
    return targets.astype(outputs.dtype).reshape(outputs.shape)


def _class_indices(name: str, outputs: mx.array, targets: mx.array) -> mx.array:
    """Targets in the outputs' shape without the class axis, as integers."""
    expected = outputs.shape[:-1]
    if outputs.ndim < 2 or outputs.shape[-1] == 1:
        raise DataError(
            f"The loss {name!r} got outputs of shape {outputs.shape}; expected shape (batch, ..., "
            "classes) with at least 2 classes. Give the model one output per class, or use "
            "loss='binary_cross_entropy'.",
            field="targets",
        )
    if _core(targets.shape) != _core(expected):
        raise DataError(
            f"The loss {name!r} got outputs of shape {outputs.shape} and targets of shape "
            f"{targets.shape}; classes are the outputs' last axis, so class indices have shape "
            f"{expected}. Reshape the targets, or move the model's classes to the last axis.",
            field="targets",
        )
    if mx.issubdtype(targets.dtype, mx.floating):
        raise DataError(
            f"The loss {name!r} got targets of shape {targets.shape} and dtype {targets.dtype} for "
            f"outputs of shape {outputs.shape}; class indices must be integers. Convert them with "
            "astype('int32'), or give a probability for each class.",
            field="targets",
        )
    indices = targets.reshape(expected)
    return indices.astype(mx.uint8) if indices.dtype == mx.bool_ else indices


# --- The losses ----------------------------------------------------------------------------------
# The factories read like the classes of PyTorch that they stand for.
# ruff: noqa: N802


def CrossEntropy(ignore_index: int | None = -100, label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy of logits over the last axis: ``logsumexp(outputs) - outputs[target]``.

    Outputs are logits of shape ``(batch, ..., classes)``. Targets are class indices of shape
    ``(batch, ...)``, of any integer dtype, or probabilities of the outputs' shape that sum to 1.

    Args:
        ignore_index: class index that does not count. None: every target counts.
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1)
            (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7).

    Raises:
        ConfigurationError: ``label_smoothing`` is outside [0, 1).

    Example:
        >>> import mlx.core as mx
        >>> CrossEntropy()(mx.array([[2.0, -1.0], [-1.0, 2.0]]), mx.array([0, -100]))
        array([0.0485873, 0], dtype=float32)
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigurationError(f"label_smoothing={label_smoothing} must be in [0, 1).")

    def cross_entropy(outputs: mx.array, targets: mx.array) -> mx.array:
        probabilities = targets.shape == outputs.shape and outputs.ndim > 1
        if not probabilities or outputs.shape[-1] == 1:
            targets = _class_indices("cross_entropy", outputs, targets)
        return nn.losses.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    return Loss("cross_entropy", cross_entropy, ignore_index, class_indices=True)


def NLL(ignore_index: int | None = -100) -> Loss:
    """Negative log-likelihood of class indices; outputs are log-probabilities over the last axis.

    Args:
        ignore_index: class index that does not count. None: every target counts.
    """

    def nll(outputs: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.nll_loss(outputs, _class_indices("nll", outputs, targets))

    return Loss("nll", nll, ignore_index, class_indices=True)


def BinaryCrossEntropy(pos_weight: float = 1.0) -> Loss:
    """Binary cross-entropy of **logits** (no sigmoid in the model), one per output.

    This is PyTorch's ``BCEWithLogitsLoss``. Targets are 0, 1 or probabilities, in the outputs'
    shape; integers and bool are converted.

    Args:
        pos_weight: factor on the positive part, above 1 for more recall.

    Raises:
        ConfigurationError: ``pos_weight`` is not positive.
    """
    if not pos_weight > 0:
        raise ConfigurationError(f"pos_weight={pos_weight} must be positive.")

    def binary_cross_entropy(outputs: mx.array, targets: mx.array) -> mx.array:
        targets = _like_outputs("binary_cross_entropy", outputs, targets)
        if pos_weight == 1:
            return nn.losses.binary_cross_entropy(outputs, targets, reduction="none")
        softplus = mx.logaddexp(0, -outputs)
        return (1 - targets) * outputs + (1 + (pos_weight - 1) * targets) * softplus

    return Loss("binary_cross_entropy", binary_cross_entropy)


def SmoothL1(beta: float = 1.0) -> Loss:
    """``e**2 / (2 * beta)`` where ``|e| < beta``, else ``|e| - beta / 2``.

    Args:
        beta: error at which the square ends; 0 is the L1 loss.

    Raises:
        ConfigurationError: ``beta`` is negative.
    """
    if not beta >= 0:
        raise ConfigurationError(f"beta={beta} must not be negative.")

    def smooth_l1(outputs: mx.array, targets: mx.array) -> mx.array:
        targets = _like_outputs("smooth_l1", outputs, targets)
        if beta == 0:
            return nn.losses.l1_loss(outputs, targets, reduction="none")
        return nn.losses.smooth_l1_loss(outputs, targets, beta=beta, reduction="none")

    return Loss("smooth_l1", smooth_l1)


def Huber(delta: float = 1.0) -> Loss:
    """``e**2 / 2`` where ``|e| <= delta``, else ``delta * (|e| - delta / 2)``.

    Args:
        delta: error at which the square ends.

    Raises:
        ConfigurationError: ``delta`` is not positive.
    """
    if not delta > 0:
        raise ConfigurationError(f"delta={delta} must be positive.")

    def huber(outputs: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.huber_loss(outputs, _like_outputs("huber", outputs, targets), delta=delta)

    return Loss("huber", huber)


def KLDiv(log_target: bool = False) -> Loss:
    """Kullback-Leibler divergence, summed over the last axis (PyTorch's ``"batchmean"`` per row).

    Outputs are log-probabilities. Targets are probabilities as in PyTorch (MLX's own function takes
    their logarithms).

    Args:
        log_target: targets are log-probabilities as well.
    """

    def kl_div(outputs: mx.array, targets: mx.array) -> mx.array:
        targets = _like_outputs("kl_div", outputs, targets)
        if log_target:
            return nn.losses.kl_div_loss(outputs, targets)
        # 0 log 0 is 0.
        log_targets = mx.log(mx.where(targets > 0, targets, 1))
        return (targets * (log_targets - outputs)).sum(-1)

    return Loss("kl_div", kl_div)


def _mse(outputs: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.mse_loss(outputs, _like_outputs("mse", outputs, targets), reduction="none")


def _l1(outputs: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.l1_loss(outputs, _like_outputs("l1", outputs, targets), reduction="none")


def _hinge(outputs: mx.array, targets: mx.array) -> mx.array:
    if targets.dtype == mx.bool_ or mx.issubdtype(targets.dtype, mx.unsignedinteger):
        raise DataError(
            f"The loss 'hinge' got targets of dtype {targets.dtype}; it expects -1 and 1. "
            "Convert them with 2.0 * y - 1.0.",
            field="targets",
        )
    return nn.losses.hinge_loss(outputs, _like_outputs("hinge", outputs, targets))


def _log_cosh(outputs: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.log_cosh_loss(outputs, _like_outputs("log_cosh", outputs, targets))


def _cosine_similarity(outputs: mx.array, targets: mx.array) -> mx.array:
    # MLX's own has a NaN gradient at a zero vector; this has PyTorch's, with its eps of 1e-8.
    targets = _like_outputs("cosine_similarity", outputs, targets)
    lengths = [mx.maximum(mx.square(x).sum(-1), 1e-16) for x in (outputs, targets)]
    return 1 - (outputs * targets).sum(-1) * mx.rsqrt(lengths[0]) * mx.rsqrt(lengths[1])


_FACTORIES: tuple[Callable[..., Loss], ...] = (
    CrossEntropy,
    NLL,
    BinaryCrossEntropy,
    SmoothL1,
    Huber,
    KLDiv,
)
_LOSSES = {
    loss.name: loss
    for loss in (
        *(factory() for factory in _FACTORIES),
        Loss("mse", _mse),
        Loss("l1", _l1),
        Loss("hinge", _hinge),
        Loss("log_cosh", _log_cosh),
        Loss("cosine_similarity", _cosine_similarity),
    )
}
_LOSSES["mae"] = _LOSSES["l1"]


def get(spec: str | Loss | Callable[..., Any]) -> Loss:
    """The loss that a name, a :class:`Loss` or a function ``f(outputs, targets)`` stands for.

    Raises:
        ConfigurationError: the name is unknown, or ``spec`` is something else.

    Example:
        >>> get("mse").name
        'mse'
    """
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        if spec not in _LOSSES:
            import difflib  # slow to import, and only for a message

            close = difflib.get_close_matches(spec, _LOSSES, 1)
            raise ConfigurationError(
                f"loss={spec!r} is unknown.{f' Did you mean {close[0]!r}?' if close else ''} "
                f"Known: {', '.join(sorted(_LOSSES))}; or give a function f(outputs, targets)."
            )
        return _LOSSES[spec]
    if any(spec is factory for factory in _FACTORIES):
        raise ConfigurationError(
            f"loss={spec.__name__} makes a loss but is none: write loss={spec.__name__}()."
        )
    if not callable(spec):
        raise ConfigurationError(
            f"loss={spec!r} is a {type(spec).__name__}; expected a name, a Loss or a function "
            "f(outputs, targets)."
        )
    return Loss(getattr(spec, "__name__", type(spec).__name__), spec, takes_trees=True)
