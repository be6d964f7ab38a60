"""Metrics against their definitions in NumPy, and against any way of cutting the data."""

from __future__ import annotations

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from mlx_fit import metrics
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.metrics import (
    AUROC,
    F1,
    MAE,
    MCC,
    MSE,
    R2,
    RMSE,
    Accuracy,
    AveragePrecision,
    BinnedAUROC,
    BinnedAveragePrecision,
    CohenKappa,
    ConfusionMatrix,
    IoU,
    Mean,
    MeanIoU,
    Perplexity,
    PRCurve,
    Precision,
    Recall,
    TopKAccuracy,
)


def state_of(metric, outputs, targets, weights=None):
    """The float64 state of one batch, as a trainer reads it."""
    weights = np.ones(len(outputs)) if weights is None else weights
    state = metric.update(
        mx.array(np.float32(outputs)), mx.array(targets), mx.array(np.float32(weights))
    )
    return {key: np.array(value, np.float64) for key, value in state.items()}


def merge(metric, states):
    join = np.concatenate if metric.collects else sum
    return {key: join([state[key] for state in states]) for key in states[0]}


def value(metric, outputs, targets, weights=None, cuts=()):
    """The metric over rows that are cut into batches at ``cuts``."""
    weights = np.ones(len(outputs)) if weights is None else np.asarray(weights)
    edges = [0, *cuts, len(outputs)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    states = [state_of(metric, outputs[s], targets[s], weights[s]) for s in parts]
    return metric.compute(merge(metric, states))


def rng(seed=0):
    return np.random.default_rng(seed)


# --- References ----------------------------------------------------------------------------------


def reference_area(scores, positive, weights):
    """Pair by pair."""
    won = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)
    pairs = np.outer(weights * positive, weights * ~positive)
    return (pairs * won).sum() / pairs.sum()


def reference_counts(predicted, truth, weights, c):
    hits = weights[(predicted == c) & (truth == c)].sum()
    return hits, weights[predicted == c].sum(), weights[truth == c].sum()


def reference_score(kind, hits, predicted, actual):
    part, whole = {
        "precision": (hits, predicted),
        "recall": (hits, actual),
        "f1": (2 * hits, predicted + actual),
    }[kind]
    return part / whole if whole else 0.0


def reference_r2(outputs, targets, weights):
    outputs, targets = np.float64(outputs), np.float64(targets)
    center = np.average(targets, axis=0, weights=weights)
    residual = np.average((targets - outputs) ** 2, axis=0, weights=weights)
    return np.mean(1 - residual / np.average((targets - center) ** 2, axis=0, weights=weights))


# --- Accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
@pytest.mark.parametrize("shape", [(20, 5), (6, 4, 5)])
def test_accuracy_of_class_labels(shape, dtype):
    logits, labels = rng().normal(size=shape), rng(1).integers(0, 5, shape[:-1])
    expected = (logits.argmax(-1) == labels).mean()
    assert value(Accuracy(), logits, labels.astype(dtype)) == pytest.approx(expected)
    assert value(Accuracy(), logits, labels.astype(dtype)[..., None]) == pytest.approx(expected)


def test_accuracy_of_one_hot_rows_and_probabilities():
    logits, chances = rng().normal(size=(20, 5)), rng(1).random((20, 5), np.float32)
    expected = (logits.argmax(-1) == chances.argmax(-1)).mean()
    assert value(Accuracy(), logits, chances) == pytest.approx(expected)
    one_hot = np.eye(5, dtype=np.uint8)[chances.argmax(-1)]
    assert value(Accuracy(), logits, one_hot) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
@pytest.mark.parametrize("shapes", [((20,), (20,)), ((20, 1), (20,)), ((20,), (20, 1))])
def test_binary_accuracy_is_of_logits_above_the_threshold(shapes, dtype):
    logits, labels = rng().normal(size=20), rng(1).integers(0, 2, 20)
    given = logits.reshape(shapes[0]), labels.astype(dtype).reshape(shapes[1])
    assert value(Accuracy(), *given) == pytest.approx(((logits > 0) == labels).mean())
    assert value(Accuracy(0.5), *given) == pytest.approx(((logits > 0.5) == labels).mean())


@pytest.mark.parametrize(
    "shapes", [((5, 3), (4,)), ((5, 3), (5, 2)), ((5,), (4,)), ((5, 1), (5, 2))]
)
@pytest.mark.parametrize("name", ["accuracy", "f1", "auroc", "confusion_matrix"])
def test_targets_of_another_shape_are_refused(name, shapes):
    with pytest.raises(DataError) as caught:
        state_of(metrics.get(name), np.zeros(shapes[0]), np.zeros(shapes[1], int))
    assert str(shapes[0]) in str(caught.value)
    assert str(shapes[1]) in str(caught.value)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_accuracy_is_that_of_sorted_logits(k):
    logits = rng().integers(0, 4, (200, 5))  # many ties, which the lower class wins
    labels = rng(1).integers(0, 5, 200)
    first = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    expected = (first == labels[:, None]).any(-1).mean()
    assert value(TopKAccuracy(k), logits, labels) == pytest.approx(expected)
    assert value(TopKAccuracy(k), logits, np.eye(5)[labels]) == pytest.approx(expected)


def test_top_1_accuracy_is_accuracy_and_nan_is_wrong():
    logits, labels = rng().integers(0, 3, (200, 5)), rng(1).integers(0, 5, 200)
    assert value(TopKAccuracy(1), logits, labels) == value(Accuracy(), logits, labels)
    assert value(TopKAccuracy(2), np.full((4, 5), np.nan), np.zeros(4, int)) == 0


@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 1)])
def test_top_k_accuracy_needs_k_classes(shape):
    with pytest.raises(ConfigurationError, match="classes"):
        state_of(TopKAccuracy(5), np.zeros(shape), np.zeros(3, int))
    with pytest.raises(ConfigurationError, match="k=0"):
        TopKAccuracy(0)


# --- Precision, recall, F1, confusion matrix -----------------------------------------------------

SCORES = {"precision": Precision, "recall": Recall, "f1": F1}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("shape", [(30,), (30, 1)])
def test_binary_scores_are_those_of_class_1(kind, shape):
    logits, labels, weights = rng().normal(size=30), rng(1).integers(0, 2, 30), rng(2).random(30)
    expected = reference_score(kind, *reference_counts(logits > 0.3, labels, weights, 1))
    got = value(SCORES[kind](threshold=0.3), logits.reshape(shape), labels, weights)
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("kind", SCORES)
def test_class_scores_average_as_asked(kind):
    logits, labels, weights = (
        rng().normal(size=(60, 6)),
        rng(1).integers(0, 4, 60),
        rng(2).random(60),
    )
    logits[:, 5] = -9  # class 5 is neither true nor predicted, class 4 only predicted
    predicted = logits.argmax(-1)
    counts = [reference_counts(predicted, labels, weights, c) for c in range(6)]
    scores = np.array([reference_score(kind, *c) for c in counts])
    support = np.array([actual for _, _, actual in counts])
    expected = {
        "macro": scores[:5].mean(),
        "micro": weights[predicted == labels].sum() / weights.sum(),
        "weighted": np.average(scores, weights=support),
        None: scores,
    }
    for average, score in expected.items():
        got = value(SCORES[kind](average), logits, labels, weights)
        np.testing.assert_allclose(got, score, rtol=1e-6)


@pytest.mark.parametrize("kind", SCORES)
def test_a_score_of_nothing_by_nothing_is_zero(kind):
    assert value(SCORES[kind](), -np.ones(4), np.zeros(4, int)) == 0.0


def test_an_unknown_average_is_refused():
    with pytest.raises(ConfigurationError, match="average='mean'"):
        F1(average="mean")


@pytest.mark.parametrize("shape", [(40, 3), (10, 4, 3), (40,)])
def test_the_confusion_matrix_counts_true_rows_and_predicted_columns(shape):
    logits = rng().normal(size=shape)
    size = 2 if len(shape) == 1 else 3
    predicted = logits > 0 if size == 2 else logits.argmax(-1)
    labels = rng(1).integers(0, size, predicted.shape)
    expected = np.zeros((size, size))
    np.add.at(expected, (labels, predicted.astype(int)), 1)
    np.testing.assert_array_equal(value(ConfusionMatrix(), logits, labels), expected)


@pytest.mark.parametrize("label", [3, -1, 10**6])
def test_a_label_that_does_not_exist_makes_nan_and_not_a_wrong_number(label):
    logits, labels = rng().normal(size=(4, 3)), np.array([0, label, 1, 2])
    assert np.isnan(value(ConfusionMatrix(), logits, labels)).all()
    assert math.isnan(value(Recall(), logits, labels))
    assert math.isnan(value(AUROC(), logits, labels))
    assert math.isnan(value(Perplexity(), logits, labels))
    assert value(TopKAccuracy(3), logits, labels) == 0.75
    assert np.isfinite(value(ConfusionMatrix(), logits, labels, [1, 0, 1, 1])).all()


# --- AUROC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 20, 10**6])
@pytest.mark.parametrize("shape", [(80,), (80, 1), (20, 4, 1)])
def test_auroc_is_the_share_of_pairs_in_order(levels, shape):
    scores = rng().integers(0, levels, 80).astype(np.float32)
    labels, weights = rng(1).random(80) < 0.3, rng(2).random(80)
    if shape == (20, 4, 1):
        weights = np.repeat(weights[:20], 4)
    expected = reference_area(scores, labels, np.float32(weights).astype(float))
    row_weights = weights[:: len(weights) // shape[0]]
    got = value(AUROC(), scores.reshape(shape), labels.reshape(shape), row_weights)
    assert got == pytest.approx(expected, rel=1e-12)


def test_auroc_of_two_logits_is_that_of_their_difference():
    logits, labels = rng().normal(size=(50, 2)), rng(1).integers(0, 2, 50)
    expected = value(AUROC(), np.float32(logits[:, 1]) - np.float32(logits[:, 0]), labels)
    assert value(AUROC(), logits, labels) == expected


@pytest.mark.parametrize("one_hot", [False, True])
def test_auroc_of_several_classes_is_the_mean_of_each_against_the_rest(one_hot):
    logits, labels = np.float32(rng().normal(size=(90, 4))), rng(1).integers(0, 3, 90)
    shares = torch.softmax(torch.tensor(logits).double(), -1).numpy()
    # Class 3 never occurs and is left out.
    areas = [reference_area(shares[:, c], labels == c, np.ones(90)) for c in range(3)]
    targets = np.eye(4)[labels] if one_hot else labels
    assert value(AUROC(), logits, targets) == pytest.approx(np.mean(areas), rel=1e-12)


def test_auroc_is_nan_with_one_class_or_a_nan_score():
    assert math.isnan(value(AUROC(), rng().normal(size=5), np.ones(5, int)))
    assert math.isnan(value(AUROC(), np.array([1, np.nan, 2]), np.array([0, 1, 1])))


# --- Regression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 3), (10, 2, 3)])
def test_regression_metrics_are_those_of_pytorch(shape):
    outputs, targets = np.float32(rng().normal(size=shape)), np.float32(rng(1).normal(size=shape))
    square = F.mse_loss(torch.tensor(outputs), torch.tensor(targets)).item()
    assert value(MSE(), outputs, targets) == pytest.approx(square)
    assert value(RMSE(), outputs, targets) == pytest.approx(math.sqrt(square))
    expected = F.l1_loss(torch.tensor(outputs), torch.tensor(targets)).item()
    assert value(MAE(), outputs, targets) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["mae", "mse", "rmse", "r2"])
def test_a_column_and_a_row_do_not_broadcast(name):
    outputs, targets = rng().normal(size=(9, 1)), np.float32(rng(1).normal(size=9))
    expected = value(metrics.get(name), outputs[:, 0], targets)
    assert value(metrics.get(name), outputs, targets) == pytest.approx(expected)
    assert value(metrics.get(name), outputs[:, 0], targets[:, None]) == pytest.approx(expected)
    with pytest.raises(DataError, match=r"\(9, 1\)"):
        state_of(metrics.get(name), outputs, targets[:3])


@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(200,), (200, 3)])
def test_r2_keeps_its_digits_far_from_zero(offset, shape):
    targets = np.float32(rng().normal(size=shape) + offset)
    outputs = np.float32(targets + rng(1).normal(0, 0.5, shape))
    weights = np.float32(rng(2).random(200))
    expected = reference_r2(outputs, targets, weights)
    assert value(R2(), outputs, targets, weights, cuts=(3, 50, 51)) == pytest.approx(
        expected, abs=2e-6
    )


def test_r2_of_rows_that_differ_between_batches_only():
    targets = np.float32([5, 5, 7, 7, 9, 9])
    assert value(R2(), targets, targets, cuts=(2, 4)) == 1
    assert value(R2(), np.full(6, 7.0), targets, cuts=(2, 4)) == pytest.approx(0)


def test_r2_of_targets_that_do_not_vary_is_1_if_exact_else_0():
    targets = np.full((10, 2), 0.1, np.float32)
    outputs = targets.copy()
    outputs[3, 1] = 0.2
    assert value(R2(), targets, targets, rng().random(10), cuts=(3, 4)) == 1
    assert value(R2(), outputs, targets, rng().random(10), cuts=(3, 4)) == 0.5


def test_r2_over_tokens_takes_their_weights():
    targets, weights = np.float32(rng().normal(size=(6, 4))), rng(1).integers(0, 3, (6, 4))
    outputs = np.float32(targets + rng(2).normal(size=(6, 4)))
    expected = reference_r2(outputs.ravel(), targets.ravel(), weights.ravel())
    assert value(R2(), outputs, targets, weights, cuts=(2,)) == pytest.approx(expected)


# --- Perplexity ----------------------------------------------------------------------------------


def test_perplexity_is_exp_of_pytorchs_mean_cross_entropy():
    logits, labels = np.float32(rng().normal(size=(6, 4, 9))), rng(1).integers(0, 9, (6, 4))
    mask = np.ones((6, 4))
    mask[0, 2:] = 0
    ignored = np.where(mask == 0, -100, labels)
    entropy = F.cross_entropy(torch.tensor(logits).movedim(-1, 1), torch.tensor(ignored))
    got = value(Perplexity(), logits, np.where(mask == 0, 0, labels), mask, cuts=(1, 4))
    assert got == pytest.approx(math.exp(entropy.item()))


def test_perplexity_of_probabilities_and_of_a_lost_cause():
    logits, chances = rng().normal(size=(5, 3)), np.float32(rng(1).dirichlet(np.ones(3), 5))
    entropy = F.cross_entropy(torch.tensor(np.float32(logits)), torch.tensor(chances)).item()
    assert value(Perplexity(), logits, chances) == pytest.approx(math.exp(entropy))
    assert value(Perplexity(), np.array([[0.0, 1e4]]), np.array([0])) == math.inf
    with pytest.raises(DataError, match="classes"):
        state_of(Perplexity(), np.zeros(4), np.zeros(4, int))


# --- Functions -----------------------------------------------------------------------------------


def test_a_function_is_a_weighted_mean_under_its_name():
    def distance(outputs, targets):
        return mx.abs(outputs - targets)

    distance.higher_is_better = False
    metric = metrics.get(distance)
    assert (metric.name, metric.higher_is_better, metric.collects) == ("distance", False, False)
    assert Mean(distance, name="far").name == "far"
    outputs, targets, weights = rng().normal(size=(8, 3)), np.zeros((8, 3)), rng(1).random(8)
    expected = np.average(np.abs(outputs).mean(-1), weights=weights)
    assert value(metric, outputs, targets, weights, cuts=(3,)) == pytest.approx(expected)


def test_a_function_that_returns_a_mean_weighs_its_batch():
    def error(outputs, targets):
        return mx.abs(outputs - targets).mean()

    outputs = np.arange(5.0)
    assert metrics.get(error).higher_is_better is None
    assert value(metrics.get(error), outputs, np.zeros(5), cuts=(2,)) == pytest.approx(2.0)
    assert value(metrics.get(error), outputs, np.zeros(5), [1, 1, 2, 2, 2], (2,)) == pytest.approx(
        (2 * 0.5 + 6 * 3) / 8
    )


def test_a_value_per_row_weighs_the_weights_of_its_tokens():
    outputs, weights = np.array([1.0, 5.0]), np.array([[1, 1, 1], [1, 0, 0]])
    metric = Mean(lambda outputs, targets: outputs, name="row")
    assert value(metric, outputs, np.zeros(2), weights) == pytest.approx((3 * 1 + 5) / 4)
    assert value(metric, outputs[:, None], np.zeros(2), weights) == pytest.approx((3 * 1 + 5) / 4)


def test_values_that_are_not_one_per_row_are_refused():
    with pytest.raises(DataError, match=r"'classes'.*\(3,\)"):
        state_of(
            Mean(lambda outputs, targets: outputs.mean(0), name="classes"),
            np.zeros((5, 3)),
            np.zeros(5),
        )


# --- Every metric: weights, cuts, compilation ----------------------------------------------------


def classes(r, n):
    return r.normal(size=(n, 4)), r.integers(0, 4, n)


def binary(r, n):
    return r.integers(-3, 3, (n, 1)).astype(float), r.integers(0, 2, n)


def real(r, n):
    return r.normal(size=(n, 2)) + 100, np.float32(r.normal(size=(n, 2)) + 100)


ALL = {
    "accuracy": (Accuracy(), classes),
    "binary accuracy": (Accuracy(), binary),
    "top 2": (TopKAccuracy(2), classes),
    "precision": (Precision(), classes),
    "binary precision": (Precision(), binary),
    "recall": (Recall("weighted"), classes),
    "f1": (F1(), classes),
    "f1 by class": (F1(None), classes),
    "confusion matrix": (ConfusionMatrix(), classes),
    "auroc": (AUROC(), classes),
    "binary auroc": (AUROC(), binary),
    "average precision": (AveragePrecision(), classes),
    "binary average precision": (AveragePrecision(), binary),
    "binned auroc": (BinnedAUROC(50), classes),
    "binary binned auroc": (BinnedAUROC(50), binary),
    "binned average precision": (BinnedAveragePrecision(50), classes),
    "pr curve": (PRCurve(11, class_index=2), classes),
    "binary pr curve": (PRCurve(11), binary),
    "mcc": (MCC(), classes),
    "binary mcc": (MCC(), binary),
    "kappa": (CohenKappa("linear"), classes),
    "binary kappa": (CohenKappa(), binary),
    "iou": (IoU(), classes),
    "mean iou": (MeanIoU(), classes),
    "binary mean iou": (MeanIoU(), binary),
    "mae": (MAE(), real),
    "mse": (MSE(), real),
    "rmse": (RMSE(), real),
    "r2": (R2(), real),
    "perplexity": (Perplexity(), classes),
    "function": (Mean(lambda outputs, targets: outputs.max(-1), name="largest"), classes),
}
every_metric = pytest.mark.parametrize("case", ALL)


def assert_equal(one, other):
    assert (one is None) == (other is None)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if one is not None:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@every_metric
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), cuts=st.sets(st.integers(1, 39)))
def test_any_cut_into_batches_gives_the_value_of_the_whole(case, seed, n, cuts):
    metric, make = ALL[case]
    outputs, targets = make(rng(seed), n)
    weights = rng(seed).choice([0, 0.5, 1, 2], n)
    whole = value(metric, outputs, targets, weights)
    assert_equal(value(metric, outputs, targets, weights, sorted(c for c in cuts if c < n)), whole)


@every_metric
def test_rows_of_weight_zero_do_not_count_whatever_they_hold(case):
    metric, make = ALL[case]
    outputs, targets = make(rng(), 30)
    kept = rng(1).random(30) < 0.6
    expected = value(metric, outputs[kept], targets[kept], cuts=(4,))
    outputs[~kept] = np.nan
    if targets.dtype == np.float32:
        targets[~kept] = np.inf
    assert_equal(value(metric, outputs, targets, kept.astype(float), cuts=(7,)), expected)


@every_metric
def test_weight_two_is_the_row_twice(case):
    metric, make = ALL[case]
    outputs, targets = make(rng(), 30)
    weights = rng(1).integers(0, 3, 30)
    expected = value(metric, np.repeat(outputs, weights, 0), np.repeat(targets, weights, 0))
    assert_equal(value(metric, outputs, targets, weights), expected)


@every_metric
def test_nothing_counted_is_none(case):
    metric, make = ALL[case]
    assert value(metric, *make(rng(), 6), np.zeros(6), cuts=(2,)) is None


@every_metric
def test_states_are_float32_of_a_shape_that_the_rows_do_not_change(case):
    metric, make = ALL[case]
    states = [metric.update(*(mx.array(a) for a in make(rng(), n)), mx.ones(n)) for n in (3, 8)]
    first = 1 if metric.collects else 0
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert a.shape[first:] == b.shape[first:]
        assert metric.collects or a.dtype == mx.float32


def test_every_metric_compiles():
    # Those whose updates differ: each costs a compiler run of a second or two.
    cases = ["accuracy", "top 2", "precision", "confusion matrix", "auroc", "mae", "r2"]
    cases += ["binned auroc", "pr curve", "binary pr curve", "mean iou"]

    def update(data, weights):
        return {case: ALL[case][0].update(*data[case], weights) for case in cases}

    data = {
        case: [mx.array(np.float32(a) if a.dtype.kind == "f" else a) for a in make(rng(), 12)]
        for case, (_, make) in ALL.items()
        if case in cases
    }
    weights = mx.array(np.float32(rng(1).random(12)))
    eager, compiled = update(data, weights), mx.compile(update)(data, weights)
    for case in cases:
        for key in eager[case]:
            np.testing.assert_allclose(compiled[case][key], eager[case][key], rtol=1e-4, atol=1e-5)


TOKENS = ["accuracy", "top 2", "f1", "confusion matrix", "auroc", "binned auroc", "pr curve", "mcc"]


@pytest.mark.parametrize("case", TOKENS)
def test_tokens_are_rows_of_their_own_where_the_weights_are(case):
    metric, make = ALL[case]
    outputs, targets = make(rng(), 24)
    weights = rng(1).choice([0, 1, 2], 24)
    got = value(
        metric, outputs.reshape(4, 6, 4), targets.reshape(4, 6), weights.reshape(4, 6), cuts=(1,)
    )
    assert_equal(got, value(metric, outputs, targets, weights))


def test_a_column_of_weights_is_one_weight_a_row():
    outputs, targets = classes(rng(), 10)
    weights = rng(1).random(10)
    for name in ("accuracy", "f1", "auroc", "perplexity"):
        got = value(metrics.get(name), outputs, targets[:, None], weights[:, None])
        assert got == pytest.approx(value(metrics.get(name), outputs, targets, weights))


# --- Names ---------------------------------------------------------------------------------------

NAMES = [
    "accuracy", "acc", "top_k_accuracy", "precision", "recall", "f1", "auroc", "auc", "mae", "mse",
    "rmse", "r2", "perplexity", "confusion_matrix", "top_5_accuracy", "top_12_accuracy",
    "average_precision", "auprc", "binned_auroc", "binned_auc", "binned_average_precision",
    "binned_auprc", "pr_curve", "mcc", "matthews_corrcoef", "cohen_kappa", "kappa", "iou",
    "jaccard", "mean_iou", "miou",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_keeps_the_name_the_user_typed(name):
    assert metrics.get(name).name == name


def test_names_stand_for_these_metrics_and_directions():
    assert isinstance(metrics.get("acc"), Accuracy)
    assert isinstance(metrics.get("auc"), AUROC)
    assert metrics.get("top_k_accuracy").k == 5
    assert metrics.get("top_12_accuracy").k == 12
    assert TopKAccuracy(3).name == "top_3_accuracy"
    higher = {name for name in NAMES if metrics.get(name).higher_is_better}
    lower = {name for name in NAMES if metrics.get(name).higher_is_better is False}
    assert lower == {"mae", "mse", "rmse", "perplexity"}
    assert higher == set(NAMES) - lower - {"confusion_matrix", "pr_curve"}


@pytest.mark.parametrize(
    "make",
    [Accuracy, TopKAccuracy, Precision, Recall, F1, AUROC, MAE, MSE, RMSE, R2, Perplexity,
     ConfusionMatrix, AveragePrecision, BinnedAUROC, BinnedAveragePrecision, PRCurve, MCC,
     CohenKappa, IoU, MeanIoU],
)  # fmt: skip
def test_every_metric_can_be_renamed(make):
    assert make(name="other").name == "other"


def test_an_unknown_name_lists_the_known_ones_and_a_guess():
    with pytest.raises(ConfigurationError) as caught:
        metrics.get("acuracy")
    assert "Did you mean 'accuracy'?" in str(caught.value)
    assert "top_<k>_accuracy" in str(caught.value)
    assert "confusion_matrix" in str(caught.value)


@pytest.mark.parametrize("spec", [3, None, Accuracy])
def test_anything_else_is_refused(spec):
    with pytest.raises(ConfigurationError):
        metrics.get(spec)


def test_weights_that_are_known_to_be_one_cost_no_work_and_change_no_bit(rng):
    from mlx_fit.metrics.base import each_counts_once, weighted

    values, ones = mx.array(rng.normal(size=50).astype(np.float32)), mx.ones(50)
    plain = weighted("m", values, ones)
    with each_counts_once(ones):
        marked = weighted("m", values, ones)
        other = weighted("m", values, ones * 2)
    assert {k: v.item() for k, v in marked.items()} == {k: v.item() for k, v in plain.items()}
    assert other["weight"].item() == 100
