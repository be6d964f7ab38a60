"""Binned metrics against the exact ones of scikit-learn, within the bound that they state."""

import itertools
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from test_metrics import merge, state_of, value

from mlx_fit import (
    ConfigurationError,
    CSVLogger,
    EarlyStopping,
    JSONLogger,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    Trainer,
)
from mlx_fit.metrics import AUROC, AveragePrecision, BinnedAUROC, BinnedAveragePrecision, PRCurve

KINDS = {BinnedAUROC: roc_auc_score, BinnedAveragePrecision: average_precision_score}
kinds = pytest.mark.parametrize("make", KINDS)


def sample(seed, n=500, gap=1.5, scale=3.0):
    """Logits that separate the labels somewhat, labels and weights."""
    r = np.random.default_rng(seed)
    truth = r.integers(0, 2, n)
    logits = np.float32(scale * (r.normal(size=n) + gap * truth))
    return logits, truth, r.integers(1, 5, n) / 2


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.float64(logits)))


@kinds
@pytest.mark.parametrize("num_bins", [2, 10, 100, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_within_the_stated_bound(make, num_bins, seed):
    logits, truth, weights = sample(seed)
    metric = make(num_bins)
    parts = [state_of(metric, logits[s], truth[s], weights[s]) for s in (slice(99), slice(99, 500))]
    state = merge(metric, parts)
    exact = KINDS[make](truth, logits, sample_weight=weights)
    error, bound = abs(metric.compute(state) - exact), metric.error_bound(state)
    assert error <= bound + 1e-6
    assert bound < {2: 1, 10: 0.6, 100: 0.15, 1000: 0.03}[num_bins]


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        ([19, *range(18, 9, -1)], [0, *[1] * 9]),
        ([*[9] * 9, 19, *range(18, 9, -1)], [*[1] * 10, *[0] * 9]),
    ],
)
@kinds
def test_the_bound_holds_for_the_worst_and_the_best_order_within_a_bin(make, logits, targets):
    logits, targets = np.array(logits), np.array(targets)
    logits = np.where((targets == 1) & (logits == 9), 5.0, logits / 20)  # below 1 is one of 4 bins
    metric = make(4)
    state = state_of(metric, logits, targets)
    error = abs(metric.compute(state) - KINDS[make](targets, logits))
    assert 0.01 < error <= metric.error_bound(state) + 1e-9


@kinds
def test_ties_within_the_bins_are_exact(make):
    r = np.random.default_rng(3)
    logits, truth, weights = r.integers(-4, 5, 200) * 1.0, r.integers(0, 2, 200), r.random(200)
    expected = KINDS[make](truth, logits, sample_weight=weights)
    assert value(make(64), logits, truth, weights, cuts=(9, 70)) == pytest.approx(expected)


@kinds
def test_confident_and_rare_scores_are_told_apart(make):
    truth = np.arange(200) % 2
    for center in (-14, 14):
        logits = np.random.default_rng(0).normal(size=200) * 3 + truth * 2 + center
        exact = KINDS[make](truth, logits)
        assert value(make(1000), logits, truth) == pytest.approx(exact, abs=0.02)


@kinds
def test_probabilities_give_what_their_logits_give(make):
    logits, truth, weights = sample(5)
    expected = value(make(300), logits, truth, weights)
    shares = sigmoid(logits)
    got = value(make(300, from_logits=False), shares, truth, weights)
    assert got == pytest.approx(expected, abs=2e-3)
    pairs = np.stack([1 - shares, shares], -1)
    assert value(make(300, from_logits=False), pairs, truth, weights) == pytest.approx(
        got, abs=2e-3
    )


@pytest.mark.parametrize("pair", [(BinnedAUROC, AUROC), (BinnedAveragePrecision, AveragePrecision)])
@pytest.mark.parametrize("from_logits", [True, False])
def test_several_classes_are_averaged_as_the_exact_metric_does(pair, from_logits):
    binned, exact = pair
    r = np.random.default_rng(0)
    truth = r.choice([0, 1, 3], 400)  # class 2 never occurs
    logits = 2 * r.normal(size=(400, 4)) + 3 * np.eye(4)[truth]
    outputs = logits if from_logits else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = value(exact(), logits, truth)
    got = value(binned(2000, from_logits), outputs, truth, cuts=(100, 150))
    assert got == pytest.approx(expected, abs=3e-3)


@kinds
def test_infinite_logits_are_the_outermost_and_nan_is_nan(make):
    logits, truth = np.array([-np.inf, 0, 1, np.inf]), np.array([0, 0, 1, 1])
    assert value(make(), logits, truth) == 1
    assert math.isnan(value(make(), np.array([np.nan, 1.0]), np.array([0, 1])))
    assert math.isnan(value(make(), np.eye(3), np.array([0, 1, 5])))
    shares = np.array([0.0, 1.0, 0.5])
    assert value(make(from_logits=False), shares, np.array([0, 1, 1])) == 1
    assert math.isnan(value(make(from_logits=False), shares + 0.1, np.array([0, 1, 1])))


@kinds
def test_one_class_alone_is_undefined(make):
    got = value(make(), np.arange(4.0), np.zeros(4, int))
    assert math.isnan(got)


@pytest.mark.parametrize("bad", [1, 0, 2.5, True])
@kinds
def test_bins_are_a_whole_number(make, bad):
    with pytest.raises(ConfigurationError, match="num_bins"):
        make(bad)
    with pytest.raises(ConfigurationError, match="from_logits"):
        make(10, from_logits="no")


# --- PRCurve --------------------------------------------------------------------------------------


def reference_curve(shares, positive, weights, num_thresholds):
    """Threshold by threshold, from scikit-learn's confusion matrices."""
    lists = []
    for number in range(num_thresholds):
        chosen = np.float32(shares) >= np.float32(number / (num_thresholds - 1))
        matrix = confusion_matrix(positive, chosen, labels=[0, 1], sample_weight=weights)
        (tn, fp), (fn, tp) = matrix
        lists.append((tp, fp, tn, fn))
    names = "true_positives", "false_positives", "true_negatives", "false_negatives"
    return dict(zip(names, map(list, zip(*lists, strict=True)), strict=True))


def assert_curves(got, expected):
    assert got.keys() == expected.keys()
    for key in got:
        assert isinstance(got[key], list)
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-6, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("num_thresholds", [2, 11, 101, 128])
def test_counts_by_threshold_are_those_of_scikit_learn(num_thresholds):
    logits, truth, weights = sample(0)
    metric = PRCurve(num_thresholds)
    got = value(metric, logits, truth, weights, cuts=(3, 200))
    shares = np.array(mx.sigmoid(mx.array(logits)))
    assert_curves(got, reference_curve(shares, truth, weights, num_thresholds))


@pytest.mark.parametrize("num_thresholds", [11, 30, 42, 101, 1001])
def test_a_probability_on_a_threshold_reaches_it(num_thresholds):
    shares = np.float32(np.arange(num_thresholds) / (num_thresholds - 1))
    got = value(PRCurve(num_thresholds, from_logits=False), shares, np.ones(num_thresholds, int))
    assert got["true_positives"] == list(range(num_thresholds, 0, -1))
    below = np.nextafter(shares, np.float32(0))  # the first stays 0, others miss their threshold
    got = value(PRCurve(num_thresholds, from_logits=False), below, np.ones(num_thresholds, int))
    assert got["true_positives"] == [num_thresholds, *range(num_thresholds - 2, -1, -1)]


def test_a_class_of_several_is_counted_against_the_rest():
    r = np.random.default_rng(2)
    logits, truth, weights = r.normal(size=(90, 4)), r.integers(0, 4, 90), r.random(90)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for c, from_logits in itertools.product((0, 3), (True, False)):
        metric = PRCurve(21, from_logits=from_logits, class_index=c)
        got = value(metric, logits if from_logits else shares, truth, weights, cuts=(50,))
        assert_curves(got, reference_curve(shares[:, c], truth == c, weights, 21))


def test_what_is_no_probability_makes_the_counts_nan():
    got = value(PRCurve(5, from_logits=False), np.array([0.5, 1.5]), np.array([0, 1]))
    assert all(math.isnan(x) for x in got["true_positives"])
    got = value(PRCurve(5), np.array([0.5, np.nan]), np.array([0, 1]))
    assert math.isnan(got["false_negatives"][0])


@pytest.mark.parametrize(("shape", "index"), [((6,), 0), ((6, 1), 2), ((6, 3), 3)])
def test_a_class_that_does_not_exist_is_refused(shape, index):
    with pytest.raises(ConfigurationError, match=f"class_index={index}"):
        value(PRCurve(class_index=index), np.zeros(shape), np.zeros(6, int))


def test_pr_curve_arguments_are_checked():
    for bad in ({"num_thresholds": 1}, {"from_logits": 1}, {"class_index": -1}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            PRCurve(**bad)


# --- In a run -------------------------------------------------------------------------------------

WATCHED = ["binned_auroc", "binned_auprc", "auprc", "mcc", "kappa", "miou", "iou", "pr_curve"]


def run(folder, data, resume=False, callbacks=(), **options):
    mx.random.seed(1)
    model, optimizer = nn.Linear(3, 1), optim.SGD(0.1)
    trainer = Trainer(
        model, optimizer, "binary_cross_entropy", metrics=WATCHED, batch_size=8, seed=0,
        compile=False,
    )  # fmt: skip
    options = {"epochs": 2, "verbose": 0, "checkpoint_every": "3 steps"} | options
    return trainer, trainer.fit(
        data, data, checkpoint_dir=folder, resume=resume, callbacks=callbacks, **options
    )


@pytest.fixture(scope="module")
def data():
    r = np.random.default_rng(0)
    x = np.float32(r.normal(size=(40, 3)))
    return x, np.float32(x[:, :1] + r.normal(size=(40, 1)) > 0)


def test_a_resumed_run_has_the_values_of_one_that_never_stopped(data, tmp_path):
    whole = run(tmp_path / "a", data)[1]
    run(tmp_path / "b", data, max_steps=8)
    resumed = run(tmp_path / "b", data, resume=True)[1]
    assert resumed.history == whole.history
    assert {f"val_{key}" for key in WATCHED} < whole.history.keys()


def test_an_evaluation_has_the_values_of_scikit_learn(data, tmp_path):
    x, y = data
    trainer, _ = run(tmp_path, data)
    found, scores = trainer.evaluate(data), trainer.predict(x)
    assert found["auprc"] == pytest.approx(average_precision_score(y, scores), rel=1e-4)
    assert found["binned_auroc"] == pytest.approx(roc_auc_score(y, scores), abs=0.01)
    curve = reference_curve(sigmoid(scores[:, 0]), y[:, 0] == 1, np.ones(40), 101)
    assert_curves(found["pr_curve"], curve)


def test_the_callbacks_draw_and_write_a_curve(data, tmp_path):
    log = JSONLogger(tmp_path / "log.jsonl")
    watchers = [TensorBoard(tmp_path / "board"), CSVLogger(tmp_path / "log.csv"), log]
    history = run(None, data, callbacks=watchers, verbose=2, checkpoint_every="epoch")[1].history
    for folder, key in (("train", "pr_curve"), ("validation", "val_pr_curve")):
        (file,) = (tmp_path / "board" / folder).iterdir()
        events = [v for event in EventFileLoader(str(file)).Load() for v in event.summary.value]
        curve = [v for v in events if v.tag == "epoch_pr_curve"][-1]
        assert curve.metadata.plugin_data.plugin_name == "pr_curves"
        drawn = np.array(curve.tensor.float_val).reshape(6, 101)
        np.testing.assert_allclose(drawn[:4], list(history[key][-1].values()))
    assert '"true_positives": [' in log.path.read_text()
    assert "pr_curve" not in (tmp_path / "log.csv").read_text()


@pytest.mark.parametrize("make", [EarlyStopping, ModelCheckpoint, ReduceLROnPlateau])
def test_a_curve_cannot_be_monitored(data, tmp_path, make):
    path = [tmp_path / "best.safetensors"] if make is ModelCheckpoint else []
    options = {"save_best_only": True} if path else {}
    callback = make(*path, monitor="val_pr_curve", mode="max", **options)
    with pytest.raises(ConfigurationError, match="'val_pr_curve', which is a dict; expected a key"):
        run(None, data, callbacks=[callback], checkpoint_every="epoch")
