"""Average precision against scikit-learn; AUROC is compared in test_metrics.py."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from test_metrics import value

from mlx_fit.metrics import AveragePrecision


@pytest.mark.parametrize("levels", [3, 20, 10**6])
@pytest.mark.parametrize("shape", [(80,), (80, 1), (20, 4, 1)])
def test_average_precision_is_that_of_scikit_learn(levels, shape):
    r = np.random.default_rng(0)
    scores, truth, weights = r.integers(-levels, levels, 80), r.integers(0, 2, 80), r.random(80)
    expected = average_precision_score(truth, scores, sample_weight=weights)
    axes = shape if len(shape) < 3 else shape[:2]
    given = [array.reshape(axes) for array in (truth, weights)]
    got = value(AveragePrecision(), scores.reshape(shape), *given, cuts=(3, 8))
    assert got == pytest.approx(expected, rel=1e-5)


def test_it_is_the_mean_over_the_classes_that_occur():
    r = np.random.default_rng(1)
    logits, truth, weights = r.normal(size=(60, 4)), r.choice([0, 1, 3], 60), r.random(60)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    each = [
        average_precision_score(truth == c, shares[:, c], sample_weight=weights) for c in (0, 1, 3)
    ]
    got = value(AveragePrecision(), logits, truth, weights, cuts=(11,))
    assert got == pytest.approx(np.mean(each), rel=1e-5)


def test_without_positives_or_with_a_nan_score_it_is_nan():
    assert math.isnan(value(AveragePrecision(), np.arange(3.0), np.zeros(3, int)))
    assert math.isnan(value(AveragePrecision(), np.array([0, np.nan]), np.array([0, 1])))
    assert value(AveragePrecision(), np.arange(3.0), np.ones(3, int)) == 1
