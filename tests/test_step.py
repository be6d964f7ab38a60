"""The training step: windows, weights, clipping, non-finite losses, freezing, learning rates."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_fit import Callback, ConfigurationError, NonFiniteLossError, Sums, Trainer
from mlx_fit.losses import CrossEntropy
from mlx_fit.options import StepOptions

RATE = 0.1


def linear(rng, num_inputs=4):
    model = nn.Linear(num_inputs, 1, bias=False)
    model.weight = mx.array(rng.normal(size=(1, num_inputs)), mx.float32)
    return model


def rows(rng, n=20):
    x = rng.normal(size=(n, 4)).astype(np.float32)
    return x, rng.normal(size=(n, 1)).astype(np.float32), rng.random(n).astype(np.float32)


def descend(weight, x, y, weights):
    """One step of gradient descent on sum(w * (x @ W - y)**2) / sum(w), in float64."""
    error = x.astype(np.float64) @ weight.T - y
    gradient = 2 * (weights[:, None] * error * x).sum(0) / weights.sum()
    return weight - RATE * gradient, float((weights * error[:, 0] ** 2).sum() / weights.sum())


def split(arrays, ends):
    return list(zip(*(np.split(array, ends) for array in arrays), strict=True))


def state_of(model, optimizer):
    arrays = tree_flatten(model.parameters()) + tree_flatten(optimizer.state)
    return {f"{i} {name}": np.array(value) for i, (name, value) in enumerate(arrays)}


def assert_unchanged(before, after):
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


# --- windows --------------------------------------------------------------------------------------


def test_short_windows_weigh_what_they_hold(rng):
    """20 rows in micro-batches of 4, accumulation 3: windows of three and of two batches."""
    model, (x, y, _) = linear(rng), rows(rng)
    weight, losses = np.array(model.weight, np.float64), []
    for part in (slice(0, 12), slice(12, 20)):
        weight, loss = descend(weight, x[part], y[part], np.ones(20)[part])
        losses.append(loss)
    trainer = Trainer(model, optim.SGD(RATE), "mse", gradient_accumulation=3)
    history = trainer.fit(split((x, y), [4, 8, 12, 16]), verbose=0)
    np.testing.assert_allclose(np.array(model.weight), weight, rtol=1e-5, atol=1e-6)
    assert history.history["loss"] == pytest.approx([np.average(losses, weights=[12, 8])], rel=1e-6)
    assert trainer.step == trainer.optimizer.step.item() == 2


def test_a_short_window_is_flushed_where_the_number_of_batches_is_unknown(rng):
    """A generator: the epoch ends while a window is open."""
    model, (x, y, _) = linear(rng), rows(rng)
    weight, _ = descend(np.array(model.weight, np.float64), x, y, np.ones(20))
    trainer = Trainer(model, optim.SGD(RATE), "mse", gradient_accumulation=9)
    trainer.fit(lambda: iter(split((x, y), [4, 8, 12, 16])), verbose=0)
    np.testing.assert_allclose(np.array(model.weight), weight, rtol=1e-5, atol=1e-6)
    assert trainer.step == 1


def test_the_hooks_of_the_last_batch_see_its_window_closed(rng):
    """Where the number of batches is known; batches 3 and 5 of five close a window of three."""
    steps, (x, y, _) = [], rows(rng)

    class Watch(Callback):
        def on_train_batch_end(self, batch, logs):
            steps.append((self.trainer.step, self.trainer.optimizer.step.item()))

    trainer = Trainer(linear(rng), optim.SGD(RATE), "mse", batch_size=4, gradient_accumulation=3)
    trainer.fit((x, y), callbacks=Watch(), verbose=0)
    assert steps == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2)]


@settings(max_examples=25, deadline=None)
@given(
    ends=st.lists(st.integers(1, 19), max_size=7, unique=True).map(sorted),
    zeros=st.sets(st.integers(0, 19), max_size=18),
    on_device=st.booleans(),
)
def test_any_split_of_weighted_rows_equals_the_big_batch(ends, zeros, on_device):
    """Micro-batches of weight 0 included, with weights of the host and of the device."""
    rng = np.random.default_rng(0)
    model, (x, y, weights) = linear(rng), rows(rng)
    weights[list(zeros)] = 0
    expected, loss = descend(np.array(model.weight, np.float64), x, y, weights)
    trainer = Trainer(
        model, optim.SGD(RATE), "mse", gradient_accumulation=len(ends) + 1, compile=False
    )
    batches = split((x, y, weights), ends)
    if on_device:
        batches = [tuple(map(mx.array, batch)) for batch in batches]
    history = trainer.fit(batches, verbose=0)
    np.testing.assert_allclose(np.array(model.weight), expected, rtol=1e-5, atol=1e-6)
    assert history.history["loss"] == pytest.approx([loss], rel=1e-5)
    assert trainer.optimizer.step.item() == 1


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_rows_without_weights_count_as_one(on_device, rng):
    model, (x, y, _) = linear(rng), rows(rng)
    ones = np.ones(20, np.float32)
    batches = [[mx.array(a) for a in (x, y, ones)]] if on_device else [(x, y, ones)]
    weight, _ = descend(np.array(model.weight, np.float64), x, y, ones)
    Trainer(model, optim.SGD(RATE), "mse").fit(batches, verbose=0)
    np.testing.assert_allclose(np.array(model.weight), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_window_of_weight_zero_updates_nothing(on_device, accumulation, rng):
    model, (x, y, weights) = linear(rng), rows(rng, 8)
    optimizer = optim.AdamW(RATE, weight_decay=0.5)
    trainer = Trainer(model, optimizer, "mse", gradient_accumulation=accumulation)
    good, zero = (x, y, weights), (x, y, 0 * weights)
    if on_device:
        good, zero = tuple(map(mx.array, good)), tuple(map(mx.array, zero))
    trainer.fit([good] * accumulation, verbose=0)
    before = state_of(model, optimizer)
    history = trainer.fit([zero] * 3 * accumulation, verbose=0)
    assert_unchanged(before, state_of(model, optimizer))
    assert history.history["skipped_updates"] == [3]
    assert "loss" not in history.history
    assert (trainer.step, optimizer.step.item()) == (4, 1)


def test_batches_of_weight_zero_on_the_host_are_not_dispatched(rng):
    calls = []
    x, y, weights = rows(rng, 8)

    def loss(outputs, targets):
        calls.append(outputs.shape)
        return (outputs - targets).square().mean(-1)

    Trainer(linear(rng), optim.SGD(RATE), loss, compile=False).fit(
        [(x, y, 0 * weights), (x, y, weights), (x, y, 0 * weights)], verbose=0
    )
    assert calls == [(8, 1)]


def test_a_first_window_whose_labels_are_all_ignored_updates_nothing(rng):
    model = nn.Linear(4, 3)
    x, y = rows(rng, 8)[0], np.full(8, -100)
    for batch in ((x, y), (mx.array(x), mx.array(y))):
        optimizer = optim.AdamW(RATE)
        before = np.array(model.weight)
        history = Trainer(model, optimizer, "cross_entropy").fit([batch], verbose=0)
        np.testing.assert_array_equal(np.array(model.weight), before)
        assert history.history["skipped_updates"] == [1]
        assert optimizer.step.item() == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sums_that_weigh_nothing_update_nothing(accumulation, rng):
    """A weight that only the device knows, from the first window on."""
    model, (x, y, weights) = linear(rng), rows(rng, 8)
    optimizer = optim.AdamW(RATE)

    def objective(model, batch):
        x, y, weights = batch
        return Sums(((model(x) - y).square().mean(-1) * weights).sum(), weights.sum())

    trainer = Trainer(model, optimizer, objective=objective, gradient_accumulation=accumulation)
    before = np.array(model.weight)
    history = trainer.fit([(x, y, 0 * weights)] * accumulation, verbose=0)
    np.testing.assert_array_equal(np.array(model.weight), before)
    assert optimizer.step.item() == 0
    assert history.history["skipped_updates"] == [1]
    weight, loss = descend(before.astype(np.float64), x, y, weights)
    trainer.optimizer = optim.SGD(RATE)
    history = trainer.fit([(x, y, weights)] * accumulation, verbose=0)
    np.testing.assert_allclose(np.array(model.weight), weight, rtol=1e-5, atol=1e-6)
    assert history.history["loss"] == pytest.approx([loss], rel=1e-6)


def test_ignored_labels_in_micro_batches_equal_the_big_batch(rng):
    x, y = rng.normal(size=(12, 4)).astype(np.float32), rng.integers(0, 3, 12)
    y[[0, 1, 2, 5, 6, 11]] = 7
    weights = []
    for ends, count in ([], 1), ([3, 4, 9], 4):
        mx.random.seed(1)
        model = nn.Linear(4, 3)
        trainer = Trainer(
            model, optim.SGD(RATE), CrossEntropy(ignore_index=7), gradient_accumulation=count
        )
        trainer.fit(split((x, y), ends), verbose=0)
        weights.append(np.array(model.weight))
    np.testing.assert_allclose(*weights, rtol=1e-5, atol=1e-7)


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[], [4, 12]], ids=["one batch", "a window"])
def test_the_norm_is_clipped_once_on_the_averaged_gradient(ends, rng):
    model, (x, y, weights) = linear(rng), rows(rng)
    start = np.array(model.weight, np.float64)
    step = (descend(start, x, y, weights)[0] - start) / RATE
    norm = np.linalg.norm(step)  # a NumPy number, as limits computed from data are
    trainer = Trainer(
        model, optim.SGD(RATE), "mse", clip_norm=0.5 * norm, gradient_accumulation=len(ends) + 1
    )
    history = trainer.fit(split((x, y, weights), ends), verbose=0)
    np.testing.assert_allclose(
        np.array(model.weight), start + RATE * 0.5 * step, rtol=1e-5, atol=1e-6
    )
    assert history.history["grad_norm"] == pytest.approx([norm], rel=1e-5)


def test_a_gradient_below_the_limit_is_left_alone_to_the_bit(rng):
    x, y, _ = rows(rng)
    weights = []
    for options in ({}, {"clip_norm": 1e6}, {"clip_value": 1e6}):
        model = linear(np.random.default_rng(5))
        Trainer(model, optim.SGD(RATE), "mse", **options).fit((x, y), shuffle=False, verbose=0)
        weights.append(np.array(model.weight))
    np.testing.assert_array_equal(weights[1], weights[0])
    np.testing.assert_array_equal(weights[2], weights[0])


def test_grad_norm_is_the_mean_over_the_updates_of_the_epoch(rng):
    """Three updates, one of them skipped: the mean of two norms."""
    x, y, _ = rows(rng)
    bad = np.full_like(x[8:16], np.nan)
    start = np.array(linear(np.random.default_rng(5)).weight, np.float64)
    norms, weight = [], start
    for part in (slice(0, 8), slice(16, 20)):
        new, _ = descend(weight, x[part], y[part], np.ones(20)[part])
        norms.append(np.linalg.norm(new - weight) / RATE)
        weight = new
    trainer = Trainer(
        linear(np.random.default_rng(5)), optim.SGD(RATE), "mse", clip_norm=1e3, nonfinite="skip"
    )
    batches = [(x[:8], y[:8]), (bad, y[8:16]), (x[16:], y[16:])]
    history = trainer.fit(batches, verbose=0)
    assert history.history["grad_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)


def test_grad_norm_is_not_logged_without_clip_norm(rng):
    x, y, _ = rows(rng)
    for options in ({}, {"clip_value": 1.0}):
        history = Trainer(linear(rng), optim.SGD(RATE), "mse", **options).fit((x, y), verbose=0)
        assert "grad_norm" not in history.history


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0},
        {"clip_value": -1.0},
        {"clip_norm": 1.0, "clip_value": 1.0},
        {"gradient_accumulation": 0},
        {"gradient_accumulation": 1.5},
        {"gradient_accumulation": True},
        {"nonfinite": "stop"},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_at_construction(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        StepOptions(**options)


# --- non-finite losses ----------------------------------------------------------------------------


class Noted(nn.Module):
    """A network with BatchNorm, whose running statistics a bad batch must not touch."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm(8), nn.Linear(8, 1)

    def __call__(self, x):
        return self.last(nn.tanh(self.norm(self.first(x))))


def noted():
    mx.random.seed(2)
    model = Noted()
    mx.eval(model.parameters())
    return model


def good_and_bad(rng, at, n=6):
    batches = [rows(rng, 8)[:2] for _ in range(n)]
    bad = [*batches]
    bad[at] = (batches[at][0] * np.float32("nan"), batches[at][1])
    return bad, batches[:at] + batches[at + 1 :]


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_first_bad_step_is_named(accumulation, at, rng):
    bad, _ = good_and_bad(rng, at)
    trainer = Trainer(noted(), optim.SGD(RATE), "mse", gradient_accumulation=accumulation)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit(bad * 10, epochs=3, verbose=0)
    assert caught.value.step == at // accumulation + 1
    assert caught.value.epoch == 0
    assert np.isnan(caught.value.value)
    assert trainer.step <= 10  # it was noticed at the first look, log_every steps in


def test_a_bad_step_of_a_later_fit_is_counted_over_all_fits(rng):
    bad, good = good_and_bad(rng, 1)
    trainer = Trainer(noted(), optim.SGD(RATE), "mse")
    trainer.fit(good, verbose=0)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit(bad, verbose=0)
    assert caught.value.step == 5 + 2


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("at", [0, 3])
def test_skip_leaves_everything_as_if_the_batch_had_not_been(at, kind, rng):
    bad, good = good_and_bad(rng, at)
    loss = "mse"
    if kind == "gradient":  # a finite loss whose gradient is not: sqrt at 0
        bad[at] = (np.zeros((8, 4), np.float32), np.zeros((8, 1), np.float32))

        def loss(outputs, targets):
            root = mx.sqrt(mx.where(targets == 0, outputs * 0, 1.0))
            return (outputs - targets).square() + root

    runs = []
    for batches in (bad, good):
        trainer = Trainer(noted(), optim.AdamW(RATE), loss, nonfinite="skip")
        history = trainer.fit(batches, verbose=0)
        runs.append((state_of(trainer.model, trainer.optimizer), history.history))
    assert_unchanged(*(state for state, _ in runs))
    assert runs[0][1]["skipped_updates"] == [1]
    assert runs[1][1]["skipped_updates"] == [0]
    if kind == "loss":
        assert runs[0][1]["loss"] == pytest.approx(runs[1][1]["loss"], rel=1e-7)


def test_skip_drops_a_bad_micro_batch_from_its_window(rng):
    bad, good = good_and_bad(rng, 1)
    runs = []
    for batches, splits in ((bad, [3, 3]), (good, [2, 3])):
        model, optimizer = noted(), optim.SGD(RATE, momentum=0.9)
        for part in np.split(np.arange(len(batches)), np.cumsum(splits)[:-1]):
            trainer = Trainer(
                model, optimizer, "mse", gradient_accumulation=len(part), nonfinite="skip"
            )
            trainer.fit([batches[i] for i in part], verbose=0)
        runs.append(state_of(model, optimizer))
    assert_unchanged(*runs)


def test_a_window_of_bad_batches_alone_is_skipped(rng):
    bad, _ = good_and_bad(rng, 0)
    model, optimizer = noted(), optim.AdamW(RATE)
    optimizer.init(model.trainable_parameters())
    before = state_of(model, optimizer)
    trainer = Trainer(model, optimizer, "mse", gradient_accumulation=2, nonfinite="skip")
    history = trainer.fit([bad[0], bad[0]], verbose=0)
    assert_unchanged(before, state_of(model, optimizer))
    assert history.history["skipped_updates"] == [1]


def test_skip_keeps_bad_rows_out_of_metrics(rng):
    x, y = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 2, 8)
    trainer = Trainer(
        nn.Linear(4, 2), optim.SGD(0.0), "cross_entropy", ["accuracy", "auroc"], nonfinite="skip"
    )
    good = trainer.fit([(x, y)], verbose=0).history
    both = trainer.fit([(x, y), (x * np.float32("nan"), y)], verbose=0).history
    for key in ("loss", "accuracy", "auroc"):
        assert both[key] == pytest.approx(good[key], rel=1e-6), key


def test_ignore_goes_on(rng):
    bad, _ = good_and_bad(rng, 1)
    trainer = Trainer(noted(), optim.SGD(RATE), "mse", nonfinite="ignore")
    history = trainer.fit(bad, epochs=2, verbose=0)
    assert np.isnan(history.history["loss"]).all()
    assert trainer.step == 12


# --- learning rates -------------------------------------------------------------------------------


class Assign(Callback):
    """Assigns the learning rate at the end of an epoch."""

    def on_epoch_end(self, epoch, logs):
        self.trainer.optimizer.learning_rate = 0.01


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_rate_assigned_under_a_schedule_raises(accumulation, rng):
    x, y, _ = rows(rng)
    optimizer = optim.SGD(optim.cosine_decay(0.1, 100))
    trainer = Trainer(
        linear(rng), optimizer, "mse", batch_size=4, gradient_accumulation=accumulation
    )
    trainer.fit((x, y), epochs=2, verbose=0)
    with pytest.raises(ConfigurationError, match="schedule"):
        trainer.fit((x, y), epochs=2, callbacks=Assign(), verbose=0)


def test_a_rate_assigned_under_a_schedule_between_fits_raises(rng):
    x, y, _ = rows(rng)
    optimizer = optim.SGD(optim.cosine_decay(0.1, 100))
    trainer = Trainer(linear(rng), optimizer, "mse")
    trainer.fit((x, y), verbose=0)
    optimizer.learning_rate = 0.5
    with pytest.raises(ConfigurationError, match="schedule"):
        trainer.fit((x, y), verbose=0)


def test_an_assigned_rate_takes_effect_without_a_retrace(rng):
    x, y, _ = rows(rng)
    model, traces = linear(rng), []

    def loss(outputs, targets):
        traces.append(1)
        return (outputs - targets).square().mean(-1)

    weight = np.array(model.weight, np.float64)
    for rate in (RATE, 0.01, 0.01):
        weight = weight + (descend(weight, x, y, np.ones(20))[0] - weight) * rate / RATE
    trainer = Trainer(model, optim.SGD(RATE), loss, batch_size=20)
    trainer.fit((x, y), epochs=3, callbacks=Assign(), verbose=0)
    np.testing.assert_allclose(np.array(model.weight), weight, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


# --- what is trained ------------------------------------------------------------------------------


def two_layers():
    mx.random.seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))


def weights_after(trainer, data, epochs, callbacks=()):
    seen = [np.array(trainer.model.layers[0].weight)]

    class Watch(Callback):
        def on_epoch_end(self, epoch, logs):
            seen.append(np.array(self.model.layers[0].weight))

    trainer.fit(data, epochs=epochs, callbacks=[Watch(), *callbacks], verbose=0)
    return [not np.array_equal(a, b) for a, b in pairwise(seen)]


class FreezeAtEnd(Callback):
    def on_epoch_end(self, epoch, logs):
        layer = self.model.layers[0]
        layer.freeze() if epoch == 0 else layer.unfreeze()


class FreezeAtBegin(Callback):
    def on_epoch_begin(self, epoch, logs):
        layer = self.model.layers[0]
        layer.freeze() if epoch == 1 else layer.unfreeze()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("callback", [FreezeAtEnd, FreezeAtBegin])
def test_a_callback_that_freezes_and_thaws_is_honoured_in_the_next_epoch(
    callback, accumulation, rng
):
    x, y, _ = rows(rng)
    trainer = Trainer(
        two_layers(), optim.Adam(RATE), "mse", batch_size=10, gradient_accumulation=accumulation
    )
    assert weights_after(trainer, (x, y), 3, [callback()]) == [True, False, True]


class FreezeAtBatch(Callback):
    def __init__(self, batch, freezes):
        self.batch, self.freezes, self.seen = batch, freezes, []

    def on_train_batch_end(self, batch, logs):
        layer = self.model.layers[0]
        self.seen.append(np.array(layer.weight))
        if batch == self.batch:
            layer.freeze() if self.freezes else layer.unfreeze()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("freezes", [True, False])
def test_a_freeze_between_two_batches_is_honoured_at_once_compiled_or_not(
    freezes, batch, accumulation, rng
):
    x, y, _ = rows(rng, 20)
    batches, seen = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)], []
    for is_compiled in (True, False):
        mx.random.seed(0)
        model, callback = two_layers(), FreezeAtBatch(batch, freezes)
        if not freezes:
            model.layers[0].freeze()
        options = {"gradient_accumulation": accumulation, "compile": is_compiled}
        trainer = Trainer(model, optim.Adam(RATE), "mse", **options)
        # A generator: only its end tells that the short last window is to be closed.
        trainer.fit(lambda: iter(batches), epochs=2, callbacks=callback, verbose=0)
        seen.append([*callback.seen, np.array(model.layers[0].weight)])
    np.testing.assert_array_equal(*seen)
    before, after = seen[0][: batch + 1], seen[0][batch:]
    assert any((w != after[0]).any() for w in after) != freezes
    assert all((w == before[0]).all() for w in before) or freezes


@pytest.mark.parametrize("freezes", [True, False])
def test_a_freeze_inside_a_window_is_in_a_checkpoint_saved_there(freezes, rng, tmp_path):
    x, y, _ = rows(rng, 20)
    found = []
    for resume in (False, tmp_path / "saved"):
        model, callback = two_layers(), FreezeAtBatch(1, freezes)
        if not freezes:
            model.layers[0].freeze()
        trainer = Trainer(model, optim.Adam(RATE), "mse", batch_size=4, gradient_accumulation=3)
        if not resume:
            end = callback.on_train_batch_end
            callback.on_train_batch_end = lambda batch, logs, end=end, trainer=trainer: (
                end(batch, logs),
                trainer.save(tmp_path / "saved") if batch == 1 else None,
            )
        trainer.fit((x, y), callbacks=callback, verbose=0, shuffle=False, resume=resume)
        found.append(np.array(model.layers[0].weight))
    np.testing.assert_array_equal(*found)


def test_a_freeze_after_a_fit_is_honoured_by_the_next(rng):
    x, y, _ = rows(rng)
    trainer = Trainer(two_layers(), optim.AdamW(RATE), "mse")
    assert weights_after(trainer, (x, y), 1) == [True]
    trainer.model.layers[0].freeze()
    assert weights_after(trainer, (x, y), 2) == [False, False]
    trainer.model.layers[0].unfreeze()
    assert weights_after(trainer, (x, y), 1) == [True]


def test_a_freeze_between_train_on_batch_calls_is_honoured(rng):
    x, y, _ = rows(rng)
    trainer = Trainer(two_layers(), optim.SGD(RATE), "mse")
    trainer.train_on_batch(x, y)
    trainer.model.layers[0].freeze()
    before = np.array(trainer.model.layers[0].weight)
    trainer.train_on_batch(x, y)
    np.testing.assert_array_equal(np.array(trainer.model.layers[0].weight), before)


def test_a_model_without_trainable_weights_is_refused(rng):
    x, y, _ = rows(rng)
    model = two_layers()
    model.freeze()
    with pytest.raises(ConfigurationError, match="frozen"):
        Trainer(model, optim.SGD(RATE), "mse").fit((x, y), verbose=0)


def test_trainable_integers_are_refused_by_name(rng):
    x, y, _ = rows(rng)
    model = two_layers()
    model.layers[0].table = mx.array([1, 2, 3])
    with pytest.raises(ConfigurationError, match=r"layers\.0\.table"):
        Trainer(model, optim.SGD(RATE), "mse").fit((x, y), verbose=0)


# --- what the user exchanges ----------------------------------------------------------------------


def test_train_on_batch_follows_another_optimizer(rng):
    x, y, _ = rows(rng)
    trainer = Trainer(linear(rng), optim.SGD(0.0), "mse")
    trainer.train_on_batch(x, y)
    weight = np.array(trainer.model.weight, np.float64)
    trainer.optimizer = optim.SGD(RATE)
    trainer.train_on_batch(x, y)
    expected, _ = descend(weight, x, y, np.ones(20))
    np.testing.assert_allclose(np.array(trainer.model.weight), expected, rtol=1e-5, atol=1e-6)


def test_optimizer_state_that_was_assigned_is_the_one_that_goes_on(rng):
    """As MLX restores it; a compiled step would go on with the old dict."""
    x, y, _ = rows(rng)
    trainer = Trainer(linear(rng), optim.SGD(RATE, momentum=0.9), "mse")
    trainer.train_on_batch(x, y)
    trainer.optimizer.state = tree_map(lambda array: mx.array(array), trainer.optimizer.state)
    trainer.train_on_batch(x, y)
    assert trainer.optimizer.step.item() == 2


def test_an_objective_that_weighs_itself_needs_no_rows(rng):
    x = rows(rng)[0]
    trainer = Trainer(
        linear(rng),
        optim.SGD(RATE),
        objective=lambda model, b: Sums((model(b["x"]) * b["scale"]).square().sum(), 20),
    )
    history = trainer.fit([{"scale": np.float32(0.5), "x": x}], verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_a_bad_step_of_a_later_epoch_is_counted_with_the_skipped_ones(rng):
    """Windows that the host skips count too, wherever they fall."""
    x, y, weights = rows(rng, 8)
    good, zero = (x, y, weights), (x, y, 0 * weights)
    bad = (x * np.float32("nan"), y, weights)
    epochs = iter([[zero, good, zero], [good, zero, bad, zero, good]])
    trainer = Trainer(linear(rng), optim.SGD(RATE), "mse")
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit(lambda: next(epochs), epochs=2, verbose=0)
    assert (caught.value.step, caught.value.epoch) == (3 + 3, 1)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_model_may_keep_its_last_activations(accumulation, policy, rng):
    """An array that appears in the model during the first forward pass, as for auxiliary losses."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 1)

        def __call__(self, x):
            self._kept = self.last(x).square().mean()
            return self.last(x)

    def objective(model, batch):
        x, y = batch
        return (model(x) - y).square().mean() + 0.1 * model._kept

    x, y, _ = rows(rng, 8)
    trainer = Trainer(
        Keeps(),
        optim.AdamW(RATE),
        objective=objective,
        nonfinite=policy,
        gradient_accumulation=accumulation,
    )
    history = trainer.fit([(x, y)] * 4, [(x, y)], epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert np.isfinite(trainer.model._kept.item())


def test_a_forward_pass_that_makes_a_parameter_is_refused_and_harmless(rng):
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 1)

        def __call__(self, x):
            self.kept = self.last(x).mean()
            return self.last(x)

    x, y, _ = rows(rng, 8)
    with pytest.raises(ConfigurationError, match="kept"):
        Trainer(Makes(), optim.AdamW(RATE), "mse").fit([(x, y)] * 4, verbose=0)
    assert np.isfinite(np.array(mx.random.normal((3,)))).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optim.MultiOptimizer(
            [optim.SGD(optim.cosine_decay(0.05, 50), momentum=0.9), optim.AdamW(0.01)],
            [lambda name, _: "bias" in name],
        ),
        lambda: optim.Adafactor(learning_rate=None),
        lambda: optim.Lion(1e-3),
        lambda: optim.Muon(0.01),
    ],
    ids=["MultiOptimizer", "Adafactor", "Lion", "Muon"],
)
@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"gradient_accumulation": 2}], ids=str)
def test_optimizers_of_every_kind_train(options, optimizer, rng):
    x, y, _ = rows(rng)
    trainer = Trainer(two_layers(), optimizer(), "mse", compile=False, **options)
    losses = trainer.fit([(x, y)] * 4, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
