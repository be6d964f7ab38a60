"""What a run costs beside its arithmetic: traces by MLX, and waits for the device."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fit.step
from mlx_fit import Callback, TensorBoard, Trainer


class Counted:
    """A loss whose Python code runs once per trace."""

    def __init__(self):
        self.shapes = []

    def __call__(self, outputs, targets):
        self.shapes.append(outputs.shape)
        return (outputs - targets).square().mean(-1)


def make(loss="mse", metrics=(), **options):
    mx.random.seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    mx.eval(model.parameters())
    trainer = Trainer(model, optim.AdamW(0.01), loss, metrics, **options)
    mx.random.seed(2)
    return trainer


def batches(sizes):
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(n, 1)).astype(np.float32))
        for n in sizes
    ]


# --- traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [(), ["mae"]], ids=["no metric", "a metric"])
def test_one_shape_is_traced_once(metrics):
    loss = Counted()
    make(loss, metrics).fit(batches([8] * 4), epochs=3, verbose=0)
    assert loss.shapes == [(8, 1)]


def test_a_ragged_last_batch_is_one_trace_more_and_later_epochs_none():
    loss = Counted()
    make(loss).fit(batches([8, 8, 5]), epochs=3, verbose=0)
    assert loss.shapes == [(8, 1), (5, 1)]


def test_each_place_in_a_window_but_the_first_shares_one_trace():
    """The first batch of a window starts the sums, the others add to them: two functions."""
    loss = Counted()
    make(loss, gradient_accumulation=4).fit(batches([8] * 10), epochs=3, verbose=0)
    assert loss.shapes == [(8, 1)] * 2


def test_evaluation_is_traced_once_per_shape_over_all_epochs():
    loss = Counted()
    trainer = make(loss)
    trainer.fit(
        batches([8] * 3), batches([6, 6, 2]), epochs=3, validation_freq="1 steps", verbose=0
    )
    assert sorted(loss.shapes) == [(2, 1), (6, 1), (8, 1)]


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"clip_norm": 1.0}], ids=str)
def test_options_cost_no_trace(options):
    loss = Counted()
    make(loss, **options).fit(batches([8] * 3), epochs=2, verbose=0)
    assert loss.shapes == [(8, 1)]


def test_weights_on_the_device_cost_no_trace():
    loss = Counted()
    x, y = map(mx.array, batches([8])[0])
    make(loss).fit([(x, y, mx.ones(8)), (x, y, mx.zeros(8)), (x, y, mx.ones(8))], verbose=0)
    assert loss.shapes == [(8, 1)]


def test_freezing_in_one_epoch_is_one_trace_more():
    class Freeze(Callback):
        def on_epoch_end(self, epoch, logs):
            if epoch == 0:
                self.model.layers[0].freeze()

    loss = Counted()
    make(loss).fit(batches([8] * 3), epochs=4, callbacks=Freeze(), verbose=0)
    assert loss.shapes == [(8, 1)] * 2


def test_train_on_batch_is_traced_once():
    loss = Counted()
    trainer, (x, y) = make(loss), batches([8])[0]
    for _ in range(3):
        trainer.train_on_batch(x, y)
    assert loss.shapes == [(8, 1)]


def test_more_than_32_shapes_are_warned_of_once_by_name():
    trainer = make(compile=False)
    with pytest.warns(UserWarning, match=r"33 different batch shapes.*\(33, 4\) float32") as caught:
        trainer.fit(batches(range(1, 40)), verbose=0)
    assert len(caught) == 1


def test_32_shapes_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = make(compile=False).fit(batches(range(1, 33)), epochs=2, verbose=0)
    assert history.epoch == [0, 1]


# --- waits ----------------------------------------------------------------------------------------

ONE_WAIT = [{"async_eval": 1, "eval": 1}] * 7  # a step is started, and the one before waited for


class Waits:
    """Counts what makes Python wait for the device."""

    def __init__(self, monkeypatch):
        self.counts = {}
        for name in ("eval", "async_eval", "synchronize"):
            monkeypatch.setattr(mx, name, self._counting(name, getattr(mx, name)))
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            monkeypatch.setattr(mx.array, name, self._counting(name, getattr(mx.array, name)))
        for name in ("array", "asarray"):  # these read an MLX array through its buffer
            monkeypatch.setattr(np, name, self._counting(name, getattr(np, name), of=mx.array))

    def _counting(self, name, function, of=object):
        def counted(*args, **kwargs):
            if name in ("eval", "async_eval", "synchronize") or isinstance(args[0], of):
                self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    def since(self):
        counts, self.counts = self.counts, {}
        return counts


def steady_waits(monkeypatch, trainer, callbacks=(), asynchronous=False):
    """What happened in each of the batches 12 to 18, between two looks of log_every=10."""
    seen = []

    class Watch(Callback):
        def on_train_batch_begin(self, batch, logs):
            if batch == 0:
                self.waits = Waits(patch)
            seen.append(self.waits.since())

    with monkeypatch.context() as patch:
        if asynchronous:
            patch.setattr(mlx_fit.step.TrainStep, "settle", in_async_mode(patch))
        trainer.fit(batches([8] * 20), callbacks=[Watch(), *callbacks], verbose=0)
    return seen[12:19]


def in_async_mode(patch):
    settle = mlx_fit.step.TrainStep.settle

    def asynchronously(self):
        self._is_async = True
        settle(self)

    return asynchronously


@pytest.mark.parametrize(
    "options",
    [{}, {"nonfinite": "skip"}, {"precision": "mixed_float16"}, {"gradient_accumulation": 2}],
    ids=str,
)
def test_a_steady_batch_waits_once(options, monkeypatch):
    trainer = make(metrics=["mae", "r2"], **options)
    assert steady_waits(monkeypatch, trainer) == ONE_WAIT


def test_a_steady_batch_waits_once_with_tensorboard(monkeypatch, tmp_path):
    waits = steady_waits(monkeypatch, make(metrics=["mae"]), [TensorBoard(tmp_path)])
    assert waits == ONE_WAIT


def test_a_steady_batch_of_a_scheduled_optimizer_waits_once(monkeypatch):
    trainer = make()
    trainer.optimizer = optim.SGD(optim.cosine_decay(0.1, 100))
    assert steady_waits(monkeypatch, trainer) == ONE_WAIT


def test_the_counter_sees_a_callback_that_looks(monkeypatch):
    class Look(Callback):
        def on_train_batch_end(self, batch, logs):
            logs["loss"]

    assert all(sum(w.values()) > 1 for w in steady_waits(monkeypatch, make(), [Look()]))


def test_on_the_cpu_a_batch_is_fetched_during_the_step_before_and_no_two_steps_overlap(monkeypatch):
    fetching, beginning = [], []
    trainer = make()

    def data():
        for batch in batches([8] * 6):
            if trainer._train_step is not None:
                fetching.append(trainer._train_step.is_under_way)
            yield batch

    to_mlx = mlx_fit.step.to_mlx

    def watched(batch):
        beginning.append(trainer._train_step.is_under_way)
        return to_mlx(batch)

    monkeypatch.setattr(mlx_fit.step, "to_mlx", watched)
    trainer.fit(data(), verbose=0)
    assert fetching[1:] == [True] * 5
    assert beginning == [False] * 6


def test_asynchronously_each_batch_is_started_and_one_long_before_is_waited_for(monkeypatch):
    waits = steady_waits(monkeypatch, make(), asynchronous=True)
    assert waits == ONE_WAIT


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 3}], ids=str)
def test_asynchronous_steps_give_the_same_bits_with_two_in_flight(options, monkeypatch):
    runs, depths = [], []

    class Watch(Callback):
        def on_train_batch_end(self, batch, logs):
            depths.append(len(self.trainer._train_step._in_flight))

    for asynchronous in (False, True):
        with monkeypatch.context() as patch:
            if asynchronous:
                patch.setattr(mlx_fit.step.TrainStep, "settle", in_async_mode(patch))
            trainer = make(metrics=["mae"], **options)
            history = trainer.fit(batches([8] * 20), epochs=2, callbacks=Watch(), verbose=0)
        runs.append((trainer, history))
    assert max(depths[:40]) == 0
    assert max(depths[40:]) == 2
    (one, first), (other, second) = runs
    for (name, a), (_, b) in zip(
        tree_flatten(one.model.parameters()), tree_flatten(other.model.parameters()), strict=True
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=name)
    assert first.history == second.history


def test_a_bad_step_is_named_at_most_two_steps_late_asynchronously(monkeypatch):
    data = batches([8] * 20)
    data[3] = (data[3][0] * np.float32("nan"), data[3][1])
    monkeypatch.setattr(mlx_fit.step.TrainStep, "settle", in_async_mode(monkeypatch))
    trainer = make()
    with pytest.raises(mlx_fit.NonFiniteLossError) as caught:
        trainer.fit(data, log_every=1, verbose=0)
    assert caught.value.step == 4
    assert trainer.step <= 6
