"""Lazy logs: packed sums, exact long means, and what a hook sees."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fit import Callback, ConfigurationError, Metric, Trainer
from mlx_fit.logs import Layout, Logs, Sums, divide, nonzero_total, total, total_of


def mean(value, weight=1.0):
    return {"sum": mx.array(value * weight), "weight": mx.array(weight)}


def fed(*batches, computes=None):
    """Sums that have seen batches of entries."""
    sums = Sums()
    for entries in batches:
        sums.batch = sums.growing(
            lambda entries=entries: sums.pack(entries, computes or dict.fromkeys(entries, divide))
        )
        feed(sums, sums.batch)
    return sums


def feed(sums, vector, tag=0):
    sums.pending.append(vector)
    sums.tags.append(tag)


# --- sums -----------------------------------------------------------------------------------------


def test_running_values_are_sums_divided_once_and_the_batch_has_its_own():
    logs = Logs(fed({"loss": mean(2.0, 8)}, {"loss": mean(5.0, 4)}))
    assert logs["loss"] == pytest.approx(3.0)
    assert logs.batch["loss"] == pytest.approx(5.0)
    assert type(logs["loss"]) is float


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    values=st.randoms(use_true_random=False),
)
def test_every_number_has_a_place_of_its_own(sizes, values):
    """Any number of keys and sizes, beyond the first capacity too."""
    arrays = [np.array([values.uniform(-9, 9) for _ in range(n)], np.float32) for n in sizes]
    entries = {f"k{i}": {"sum": mx.array(a), "weight": mx.array(2.0)} for i, a in enumerate(arrays)}
    computes = {key: lambda state: (state["sum"] / state["weight"]).tolist() for key in entries}
    logs = Logs(fed(entries, entries, computes=computes))
    for i, array in enumerate(arrays):
        np.testing.assert_allclose(logs[f"k{i}"], array / 2, rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(logs.batch[f"k{i}"], array / 2, rtol=1e-6, atol=1e-30)


def test_matrices_keep_their_shape():
    matrix = mx.arange(12).reshape(3, 4)
    sums = fed({"confusion": {"counts": matrix}}, computes={"confusion": lambda s: s["counts"]})
    np.testing.assert_array_equal(Logs(sums)["confusion"], np.arange(12).reshape(3, 4))


def test_a_long_epoch_does_not_lose_small_contributions():
    """A float32 sum of 0.1 alone is off by 2e-4 after 30,000 batches."""
    sums, vector = fed({"loss": mean(0.1)}), mx.full((32,), 0.1)
    for _ in range(29_999):
        feed(sums, vector)
    assert sums.fold()[0] == pytest.approx(30_000 * float(np.float32(0.1)), rel=1e-12)


@given(cuts=st.lists(st.integers(0, 50), max_size=8))
def test_the_bits_of_sums_do_not_depend_on_when_they_are_read(cuts):
    """A run that was resumed, or looked at, folds at other places."""
    vectors = [mx.array(v) for v in np.random.default_rng(0).normal(size=(50, 32)).astype("f4")]
    whole, looked_at = Sums(), Sums()
    for number, vector in enumerate(vectors):
        feed(whole, vector)
        feed(looked_at, vector)
        if number in cuts:
            looked_at.fold()
    assert whole.fold().tobytes() == looked_at.fold().tobytes()


def test_the_first_bad_loss_is_found_whenever_one_looks():
    for looks in ([], [1], [0, 1, 2, 3]):
        sums = fed({"loss": mean(1.0)})
        sums.restart()
        sums.watched = "loss"
        losses = [1.0, 2.0, math.inf, math.nan]
        for number, loss in enumerate(losses):
            feed(sums, sums.place({"loss": mean(loss, 2.0)}), tag=number + 1)
            if number in looks:
                sums.fold()
        assert sums.first_bad(4) == (3, math.inf)
        sums.fold()
        assert sums.first_bad(4) == (3, math.inf)


def test_a_sum_that_is_not_finite_stays_so():
    for bad in (math.nan, math.inf):
        logs = Logs(fed({"loss": mean(1.0)}, {"loss": mean(bad)}, {"loss": mean(1.0)}))
        assert not math.isfinite(logs["loss"])
        assert logs.batch["loss"] == 1.0


def test_one_value_that_is_not_finite_spoils_no_other():
    logs = Logs(
        fed(
            {"loss": mean(math.nan), "accuracy": mean(0.5)},
            {"loss": mean(1.0), "accuracy": mean(1.0)},
        )
    )
    assert logs["accuracy"] == 0.75


def test_restarting_forgets():
    sums = fed({"loss": mean(2.0)})
    sums.restart()
    assert dict(Logs(sums)) == {}


def test_a_key_that_changes_its_size_is_an_error():
    with pytest.raises(ConfigurationError, match="'loss'"):
        fed({"loss": mean(1.0)}, {"loss": {"sum": mx.zeros(2), "weight": mx.array(1.0)}})
    with pytest.raises(ConfigurationError, match="'loss'"):
        fed({"loss": mean(1.0)}, {"other": mean(1.0)})


def test_how_sums_become_values():
    state = {"sum": np.array(6.0), "weight": np.array(4.0)}
    assert divide(state) == 1.5
    assert divide({**state, "weight": np.array(0.0)}) is None
    assert total(state) == 6.0
    assert nonzero_total({"sum": np.array(0.0)}) is None


def test_a_layout_starts_empty():
    assert Layout().summed == []


# --- the mapping ----------------------------------------------------------------------------------


def test_logs_are_a_mapping_that_hooks_may_write_to():
    logs = Logs(fed({"loss": mean(2.0), "empty": mean(0.0, 0.0)}))
    assert dict(logs) == {"loss": 2.0}  # nothing was counted under "empty"
    logs["mine"] = 7
    logs["loss"] = 3.0
    assert dict(logs) == {"mine": 7, "loss": 3.0}
    assert len(logs) == 2
    del logs["loss"]
    assert "loss" not in logs
    assert list(logs) == ["mine"]
    for missing in ("loss", "empty", "typo"):
        with pytest.raises(KeyError):
            logs[missing]
    with pytest.raises(KeyError):
        del logs["typo"]
    assert repr(logs) == "Logs({'mine': 7})"


def test_logs_before_the_first_batch_are_empty():
    logs = Logs(Sums())
    assert len(logs) == len(logs.batch) == 0
    assert not logs


def test_logs_that_are_kept_keep_their_values():
    sums = fed({"loss": mean(2.0)})
    kept = Logs(sums)
    feed(sums, sums.batch * 3)
    sums.fold()
    assert kept["loss"] == 2.0
    sums.restart()
    assert Logs(sums).running == {}


# --- in a run -------------------------------------------------------------------------------------


def test_hooks_see_the_running_mean_and_the_batch(rng):
    """A ramp without learning: losses 0, 16, 64, 144, running means 0, 8, 26.7, 56."""

    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, batch, logs):
            seen.append((logs["loss"], logs.batch["loss"]))

    model = nn.Linear(4, 3, bias=False)
    model.weight = mx.ones((3, 4))
    batches = [(np.full((2, 4), i, np.float32), np.zeros((2, 3), np.float32)) for i in range(4)]
    history = Trainer(model, optim.SGD(0.0), "mse").fit(batches, callbacks=Watch(), verbose=0)
    running, own = zip(*seen, strict=True)
    assert running == pytest.approx([0, 8, 80 / 3, 56], rel=1e-6)
    assert own == pytest.approx([0, 16, 64, 144], rel=1e-6)
    assert history.history["loss"] == pytest.approx([56])


def test_the_epoch_mean_weighs_rows_not_batches(rng):
    """Rows valued 1 to 10 in batches of 4, 4 and 2: 616, not the mean of three means."""
    model = nn.Linear(4, 3, bias=False)
    model.weight = mx.ones((3, 4))
    x = np.repeat(np.arange(1, 11, dtype=np.float32)[:, None], 4, 1)
    trainer = Trainer(model, optim.SGD(0.0), "mse", batch_size=4)
    found = trainer.fit((x, np.zeros((10, 3), np.float32)), verbose=0).history["loss"]
    assert found == pytest.approx([616.0], rel=1e-6)


def test_metrics_of_many_numbers_fit_beside_the_loss(rng):
    """A confusion matrix of 20 classes: 400 numbers."""
    x, y = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 20, 60)
    model = nn.Linear(4, 20)
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy", ["confusion_matrix", "accuracy"])
    found = trainer.evaluate((x, y), verbose=0)
    predicted = trainer.predict(x, verbose=0).argmax(-1)
    expected = np.zeros((20, 20))
    np.add.at(expected, (y, predicted), 1)
    np.testing.assert_array_equal(found["confusion_matrix"], expected)
    trainer.fit((x, y), verbose=0)


def test_a_metric_may_count_in_integers(rng):
    class Rows(Metric):
        name = "rows"

        def update(self, outputs, targets, weights):
            return {"count": mx.array(outputs.shape[0])}

        def compute(self, state):
            return float(state["count"])

    x, y = rng.normal(size=(10, 4)).astype(np.float32), rng.normal(size=(10, 1))
    trainer = Trainer(nn.Linear(4, 1), optim.SGD(0.1), "mse", [Rows()], batch_size=4)
    assert trainer.evaluate((x, y), verbose=0)["rows"] == 10


def test_kernels_of_other_lanes_and_weights_are_not_mistaken():
    """MLX names kernels by digits: 1 and 33 are 13 and 3 to it."""

    def packed(count, lanes):
        sums = Sums()

        def pack(x):
            states = {f"k{i}": {"sum": x, "weight": mx.array(float(count))} for i in range(lanes)}
            return sums.pack(states, dict.fromkeys(states, divide))

        compiled = mx.compile(pack)
        return sums.growing(lambda: compiled(mx.array(0.5)))[: 2 * lanes].tolist()

    for count, lanes in ((33, 1), (3, 7), (12, 1), (2, 6)):
        assert packed(count, lanes) == [0.5, float(count)] * lanes


def test_totals_are_of_values_however_they_lie_in_memory():
    row = mx.arange(6, dtype=mx.float32)
    vectors = [row[::2], row[3:], row[:3][::-1], mx.broadcast_to(mx.array([2.0]), (3,))]
    mx.eval(vectors)
    for count in range(len(vectors) + 1):
        expected = sum((np.array(vector) for vector in vectors[:count]), np.ones(3))
        np.testing.assert_array_equal(total_of(np.ones(3), vectors[:count]), expected)
