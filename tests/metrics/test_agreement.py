"""MCC, kappa and IoU against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference
from test_metrics import value

from mlx_fit import ConfigurationError
from mlx_fit.metrics import MCC, CohenKappa, IoU, MeanIoU


def case(seed, num_classes, n=60):
    """Outputs, targets, predictions and weights; class 2 of 4 is neither true nor predicted."""
    r = np.random.default_rng(seed)
    present = [c for c in range(num_classes) if (c, num_classes) != (2, 4)]
    truth = r.choice(present, n)
    predicted = np.where(r.random(n) < 0.5, truth, r.choice(present, n))
    outputs = predicted - 0.5 if num_classes == 2 else np.eye(num_classes)[predicted]
    return outputs, truth, predicted, r.integers(0, 4, n) / 2


sizes = pytest.mark.parametrize("num_classes", [2, 3, 4])
seeds = pytest.mark.parametrize("seed", range(3))


@sizes
@seeds
def test_mcc_is_that_of_scikit_learn(seed, num_classes):
    outputs, truth, predicted, weights = case(seed, num_classes)
    expected = reference.matthews_corrcoef(truth, predicted, sample_weight=weights)
    assert value(MCC(), outputs, truth, weights, cuts=(7, 31)) == pytest.approx(expected)


@pytest.mark.parametrize("weighting", [None, "linear", "quadratic"])
@sizes
@seeds
def test_kappa_is_that_of_scikit_learn(seed, num_classes, weighting):
    outputs, truth, predicted, weights = case(seed, num_classes)
    expected = reference.cohen_kappa_score(
        truth, predicted, weights=weighting, sample_weight=weights, labels=range(num_classes)
    )
    metric = CohenKappa(weighting)
    assert value(metric, outputs, truth, weights, cuts=(7, 31)) == pytest.approx(expected)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@sizes
@seeds
def test_iou_is_the_jaccard_score_of_scikit_learn(seed, num_classes, average):
    outputs, truth, predicted, weights = case(seed, num_classes)
    kind = "binary" if num_classes == 2 else average
    expected = reference.jaccard_score(truth, predicted, average=kind, sample_weight=weights)
    assert value(IoU(average), outputs, truth, weights, cuts=(7,)) == pytest.approx(expected)


@sizes
@seeds
def test_mean_iou_is_the_macro_jaccard_score_also_of_single_logits(seed, num_classes):
    outputs, truth, predicted, weights = case(seed, num_classes)
    expected = reference.jaccard_score(truth, predicted, average="macro", sample_weight=weights)
    assert value(MeanIoU(), outputs, truth, weights, cuts=(7,)) == pytest.approx(expected)


def test_mean_iou_of_images_adds_the_pixels_of_all():
    r = np.random.default_rng(0)
    outputs, truth = r.normal(size=(6, 5, 4, 3)), r.integers(0, 3, (6, 5, 4))
    weights = r.integers(0, 2, (6, 5, 4))
    expected = reference.jaccard_score(
        truth.ravel(), outputs.argmax(-1).ravel(), average="macro", sample_weight=weights.ravel()
    )
    assert value(MeanIoU(), outputs, truth, weights, cuts=(2, 3)) == pytest.approx(expected)


@pytest.mark.parametrize("outputs", [np.ones(5), np.eye(3)[np.ones(5, int)]])
def test_one_class_alone_is_no_correlation_and_no_agreement_beyond_chance(outputs):
    targets = np.ones(5, int)
    weights = np.full(5, 0.1)
    assert value(MCC(), outputs, targets, weights) == 0
    assert value(CohenKappa(), outputs, targets, weights) == 0
    assert value(MeanIoU(), outputs, targets, weights) == 1


@pytest.mark.parametrize("make", [MCC, CohenKappa, MeanIoU, IoU])
def test_perfect_predictions_score_one_and_thresholds_move(make):
    targets = np.array([0, 1, 0, 1, 1])
    assert value(make(), targets - 0.5, targets) == pytest.approx(1)
    assert value(make(threshold=0.5), 0.2 + targets * 0.7, targets) == pytest.approx(1)
    assert value(make(), 0.2 + targets * 0.7, targets) < 0.9


@pytest.mark.parametrize("make", [MCC, CohenKappa, MeanIoU, IoU])
def test_a_label_that_does_not_exist_makes_nan(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(value(make(), np.eye(3), np.array([0, 1, 7])))


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ConfigurationError, match="expected 'linear', 'quadratic' or None"):
        CohenKappa("squared")
