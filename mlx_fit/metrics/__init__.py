"""Metrics: what is watched besides the loss, as weighted sums that add up over any split of data.

>>> [metric.name for metric in map(get, ["acc", "top_3_accuracy", RMSE()])]
['acc', 'top_3_accuracy', 'rmse']
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mlx_fit.errors import ConfigurationError
from mlx_fit.metrics.agreement import MCC, CohenKappa, IoU, MeanIoU
from mlx_fit.metrics.base import Mean, Metric
from mlx_fit.metrics.binned import BinnedAUROC, BinnedAveragePrecision, PRCurve
from mlx_fit.metrics.classification import (
    F1,
    Accuracy,
    ConfusionMatrix,
    Perplexity,
    Precision,
    Recall,
    TopKAccuracy,
)
from mlx_fit.metrics.ranking import AUROC, AveragePrecision
from mlx_fit.metrics.regression import MAE, MSE, R2, RMSE

__all__ = [
    "AUROC",
    "F1",
    "MAE",
    "MCC",
    "MSE",
    "R2",
    "RMSE",
    "Accuracy",
    "AveragePrecision",
    "BinnedAUROC",
    "BinnedAveragePrecision",
    "CohenKappa",
    "ConfusionMatrix",
    "IoU",
    "Mean",
    "MeanIoU",
    "Metric",
    "PRCurve",
    "Perplexity",
    "Precision",
    "Recall",
    "TopKAccuracy",
    "get",
]

_METRICS: dict[str, Callable[..., Metric]] = {
    "accuracy": Accuracy,
    "acc": Accuracy,
    "top_k_accuracy": TopKAccuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "auroc": AUROC,
    "auc": AUROC,
    "average_precision": AveragePrecision,
    "auprc": AveragePrecision,
    "binned_auroc": BinnedAUROC,
    "binned_auc": BinnedAUROC,
    "binned_average_precision": BinnedAveragePrecision,
    "binned_auprc": BinnedAveragePrecision,
    "pr_curve": PRCurve,
    "mcc": MCC,
    "matthews_corrcoef": MCC,
    "cohen_kappa": CohenKappa,
    "kappa": CohenKappa,
    "iou": IoU,
    "jaccard": IoU,
    "mean_iou": MeanIoU,
    "miou": MeanIoU,
    "mae": MAE,
    "mse": MSE,
    "rmse": RMSE,
    "r2": R2,
    "perplexity": Perplexity,
    "confusion_matrix": ConfusionMatrix,
}


def get(spec: str | Metric | Callable[..., Any]) -> Metric:
    """The metric that a name, a :class:`Metric` or a function ``f(outputs, targets)`` stands for.

    A metric is called what the user called it: ``"acc"`` is an :class:`Accuracy` with that name.

    Raises:
        ConfigurationError: the name is unknown, or ``spec`` is something else.
    """
    if isinstance(spec, Metric):
        return spec
    if isinstance(spec, str):
        if match := re.fullmatch(r"top_(\d+)_accuracy", spec):
            return TopKAccuracy(int(match[1]), name=spec)
        if spec in _METRICS:
            return _METRICS[spec](name=spec)
        import difflib  # slow to import, and only for a message

        close = difflib.get_close_matches(spec, _METRICS, 1)
        raise ConfigurationError(
            f"The metric {spec!r} is unknown.{f' Did you mean {close[0]!r}?' if close else ''} "
            f"Known: {', '.join(sorted(_METRICS))}, top_<k>_accuracy; or give a function "
            "f(outputs, targets)."
        )
    if isinstance(spec, type) and issubclass(spec, Metric):
        raise ConfigurationError(f"The metric {spec.__name__} is a class: write {spec.__name__}().")
    if not callable(spec):
        raise ConfigurationError(
            f"The metric {spec!r} is a {type(spec).__name__}; expected a name, a Metric or a "
            "function f(outputs, targets)."
        )
    return Mean(spec)
