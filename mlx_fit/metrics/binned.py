"""Metrics of scores that are sorted into bins: sums of a fixed size instead of all rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_fit.checks import boolean, natural
from mlx_fit.errors import ConfigurationError
from mlx_fit.metrics.base import HostState, Metric, State, per_element
from mlx_fit.metrics.classification import is_binary, labels, tally, valid
from mlx_fit.metrics.ranking import average_precision, mean_of_defined, roc_area

Score = Callable[[np.ndarray, np.ndarray], float]
FARTHEST = 1e30  # a logit beyond it is in the same bin; infinity would give NaN


class BinnedRanking(Metric):
    """A score of ranking, from counts of positives and negatives in bins of the score.

    Rows of one bin count as ties. The bins are equally wide in ``x / (1 + abs(x))`` of the logit
    ``x``, so that no logit is too large to be told from a larger one: at ``x`` a bin is about
    ``2 * (1 + abs(x)) ** 2 / num_bins`` wide.

    Takes one logit (or probability) per row, two logits, or logits of more classes. Then it is the
    mean over the classes, each against the rest by its softmax probability; classes for which it
    is not defined are left out. NaN where no class is left, or a score is NaN. The state has
    ``2 * num_bins`` numbers, and with more than two classes so many for each of them.

    Args:
        num_bins: how many bins, at least 2.
        from_logits: whether outputs are logits; False: probabilities, which make the score NaN
            where they lie outside [0, 1].
        name: key in logs.

    Raises:
        ConfigurationError: an argument cannot work.
    """

    higher_is_better = True

    def __init__(self, num_bins: int, from_logits: bool, name: str) -> None:
        self.num_bins = natural(f"{type(self).__name__}: num_bins", num_bins, 2)
        self.from_logits = boolean(f"{type(self).__name__}: from_logits", from_logits)
        self.name = name

    @abstractmethod
    def score(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The score from weights of positives and negatives by rising bin; NaN: undefined."""

    @abstractmethod
    def bound(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """How far the score can be from that of the unbinned rows; NaN: undefined."""

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weights of positives and negatives, shape ``(bins,)`` or ``(classes, bins)``."""
        _, truth, size = labels(self.name, outputs, targets)
        weights = per_element(weights, truth.shape).reshape(-1, 1)
        exists, truth = valid(truth, size).reshape(-1, 1), truth.reshape(-1, 1)
        scores = _log_odds(outputs, self.from_logits)
        num_curves = scores.shape[-1]
        spread = scores / (1 + mx.abs(scores))
        place = mx.floor((spread + 1) * (self.num_bins / 2))
        place = mx.clip(place, 0, self.num_bins - 1)
        place = place + mx.arange(num_curves) * self.num_bins
        index = mx.where(mx.isnan(scores) | ~exists, -1, place).astype(mx.int32)
        is_positive = truth == (mx.arange(num_curves) if num_curves > 1 else 1)
        weights = mx.broadcast_to(weights, index.shape)
        num_sums = num_curves * self.num_bins
        shape = (num_curves, self.num_bins) if num_curves > 1 else (self.num_bins,)
        return {
            "positives": tally(index, mx.where(is_positive, weights, 0), num_sums).reshape(shape),
            "negatives": tally(index, mx.where(is_positive, 0, weights), num_sums).reshape(shape),
        }

    def compute(self, state: HostState) -> float | None:
        """A score in [0, 1]."""
        return self._over_classes(self.score, state)

    def error_bound(self, state: HostState) -> float | None:
        """The most that :meth:`compute` can differ from the score of the same rows without bins.

        Args:
            state: as :meth:`compute` takes it.
        """
        return self._over_classes(self.bound, state)

    def _over_classes(self, score: Score, state: HostState) -> float | None:
        curves = [np.atleast_2d(state[key]) for key in ("positives", "negatives")]
        if not any(curve.any() for curve in curves):
            return None
        if any(np.isnan(curve).any() for curve in curves):
            return math.nan
        return mean_of_defined([score(*pair) for pair in zip(*curves, strict=True)])


class BinnedAUROC(BinnedRanking):
    """AUROC from counts in bins; see :class:`BinnedRanking`, and ``AUROC`` for the exact one.

    It differs from the exact area by at most half the share of pairs of a positive and a negative
    row that fall into one bin (``error_bound``), and usually by far less, since the errors of bins
    have either sign.

    Args:
        num_bins: how many bins.
        from_logits: whether outputs are logits; False: probabilities.
        name: key in logs.

    Example:
        >>> import mlx.core as mx
        >>> import numpy as np
        >>> metric = BinnedAUROC(num_bins=4)
        >>> state = metric.update(mx.array([-3.0, 0.5, 2.0]), mx.array([0, 1, 1]), mx.ones(3))
        >>> state["positives"].tolist(), state["negatives"].tolist()
        ([0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])
        >>> metric.compute({key: np.array(sums, np.float64) for key, sums in state.items()})
        1.0
    """

    def __init__(
        self, num_bins: int = 1000, from_logits: bool = True, name: str = "binned_auroc"
    ) -> None:
        super().__init__(num_bins, from_logits, name)

    def score(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The share of pairs in order, those within a bin counting one half."""
        return roc_area(positives, negatives)

    def bound(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """Half the share of pairs within a bin."""
        pairs = positives.sum() * negatives.sum()
        return float((positives * negatives).sum() / (2 * pairs)) if pairs else math.nan


class BinnedAveragePrecision(BinnedRanking):
    """Average precision from counts in bins; see :class:`BinnedRanking`.

    The precision of a bin's positives is that of all rows down to the end of the bin. It differs
    from the exact score by at most ``error_bound``: how far those precisions could be off, were
    the rows of each bin put in the best or the worst order.

    Args:
        num_bins: how many bins.
        from_logits: whether outputs are logits; False: probabilities.
        name: key in logs.
    """

    def __init__(
        self,
        num_bins: int = 1000,
        from_logits: bool = True,
        name: str = "binned_average_precision",
    ) -> None:
        super().__init__(num_bins, from_logits, name)

    def score(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The mean precision at the positives."""
        return average_precision(positives, negatives)

    def bound(self, positives: np.ndarray, negatives: np.ndarray) -> float:
        """The bins' largest errors, weighted by their positives."""
        whole = positives.sum()
        if not whole:
            return math.nan
        found, wrong = (sums[::-1].cumsum()[::-1] for sums in (positives, negatives))
        binned = _share(found, wrong)
        best = _share(found, wrong - negatives)  # the bin's positives before its negatives
        worst = _share(found - positives, wrong)  # after them, and one at a time
        error = np.maximum(best - binned, binned - worst)
        return float((positives * error).sum() / whole)


class PRCurve(Metric):
    """Counts of right and wrong decisions at rising thresholds of the probability of one class.

    The value is a dict of four lists, ``"true_positives"``, ``"false_positives"``,
    ``"true_negatives"`` and ``"false_negatives"``: weights of rows at the thresholds
    ``i / (num_thresholds - 1)`` from 0 to 1, where a probability of at least the threshold counts
    as positive. The TensorBoard callback draws it as a precision-recall curve.

    Takes one logit per row, or logits over the last axis. All are NaN where a score is NaN or no
    probability.

    Args:
        num_thresholds: how many thresholds, at least 2.
        from_logits: whether outputs are logits; False: probabilities.
        class_index: over several classes, the one that counts as positive.
        name: key in logs.

    Raises:
        ConfigurationError: an argument cannot work, or there is no such class (when first used).

    Example:
        >>> import mlx.core as mx
        >>> import numpy as np
        >>> metric = PRCurve(num_thresholds=3, from_logits=False)
        >>> state = metric.update(mx.array([0.1, 0.6, 0.9]), mx.array([0, 1, 1]), mx.ones(3))
        >>> curve = metric.compute({key: np.array(sums, np.float64) for key, sums in state.items()})
        >>> curve["true_positives"], curve["false_positives"]
        ([2.0, 2.0, 0.0], [1.0, 0.0, 0.0])
    """

    def __init__(
        self,
        num_thresholds: int = 101,
        from_logits: bool = True,
        class_index: int = 1,
        name: str = "pr_curve",
    ) -> None:
        self.num_thresholds = natural("PRCurve: num_thresholds", num_thresholds, 2)
        self.from_logits = boolean("PRCurve: from_logits", from_logits)
        self.class_index = natural("PRCurve: class_index", class_index)
        self.name = name

    def update(self, outputs: mx.array, targets: mx.array, weights: mx.array) -> State:
        """Weights of positives and negatives by the highest threshold that they reach."""
        _, truth, size = labels(self.name, outputs, targets)
        if self.class_index >= size or (is_binary(outputs) and self.class_index != 1):
            raise ConfigurationError(
                f"PRCurve(class_index={self.class_index}) got outputs of shape {outputs.shape}; "
                "expected a class of the last axis, or 1 where there is one output per row."
            )
        shares = self._probabilities(outputs).reshape(-1)
        weights = per_element(weights, truth.shape).reshape(-1)
        exists, truth = valid(truth, size).reshape(-1), truth.reshape(-1)
        is_share = (shares >= 0) & (shares <= 1)  # not so for NaN
        index = mx.where(is_share & exists, self._reached(shares), -1).astype(mx.int32)
        is_positive = truth == self.class_index
        return {
            "positives": tally(index, mx.where(is_positive, weights, 0), self.num_thresholds),
            "negatives": tally(index, mx.where(is_positive, 0, weights), self.num_thresholds),
        }

    def _probabilities(self, outputs: mx.array) -> mx.array:
        if is_binary(outputs):
            return mx.sigmoid(outputs) if self.from_logits else outputs
        if not self.from_logits:
            return outputs[..., self.class_index]
        # A sum that was rounded down would make more than 1 of it.
        return mx.minimum(mx.softmax(outputs, -1, precise=True)[..., self.class_index], 1)

    def _reached(self, shares: mx.array) -> mx.array:
        """The number of the highest threshold that is not above, whatever the product rounds to."""
        last = self.num_thresholds - 1
        index = mx.clip(mx.floor(shares * last), 0, last)
        index = mx.where(index / last > shares, index - 1, index)
        is_short = (index < last) & ((index + 1) / last <= shares)
        return mx.where(is_short, index + 1, index)

    def compute(self, state: HostState) -> dict[str, list[float]] | None:
        """Four lists of weights, a number for each threshold."""
        positives, negatives = state["positives"], state["negatives"]
        if not positives.any() and not negatives.any():
            return None
        found, wrong = (sums[::-1].cumsum()[::-1] for sums in (positives, negatives))
        return {
            "true_positives": found.tolist(),
            "false_positives": wrong.tolist(),
            "true_negatives": (wrong[0] - wrong).tolist(),
            "false_negatives": (found[0] - found).tolist(),
        }


def _log_odds(outputs: mx.array, from_logits: bool) -> mx.array:
    """Log-odds of class 1 of two, shape ``(rows, 1)``, or of each of more, ``(rows, classes)``."""
    if is_binary(outputs):
        odds = outputs.reshape(-1, 1)
        odds = odds if from_logits else mx.log(odds) - mx.log1p(-odds)
    elif outputs.shape[-1] == 2:
        pair = outputs if from_logits else mx.log(outputs)
        odds = (pair[..., 1] - pair[..., 0]).reshape(-1, 1)
    else:
        rows = outputs.reshape(-1, outputs.shape[-1])
        logs = rows - mx.logsumexp(rows, -1, keepdims=True) if from_logits else mx.log(rows)
        logs = mx.minimum(logs, 0) if from_logits else logs
        odds = logs - mx.log1p(-mx.exp(logs))
    return mx.clip(odds, -FARTHEST, FARTHEST)


def _share(part: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """``part / (part + rest)``, 1 where both are 0."""
    whole = part + rest
    return np.where(whole == 0, 1.0, part / np.where(whole == 0, 1.0, whole))
