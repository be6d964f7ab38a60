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

ONE_WAIT = [{"async_eval": 1, "synchronize": 1}] * 7  # a step is started after the one before
ONE_WAIT_LATER = [{"async_eval": 1, "eval": 1}] * 7


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
        self._is_async, self._overlaps = True, False
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


def test_on_the_cpu_a_batch_is_prepared_during_the_step_before_and_no_two_steps_overlap(
    monkeypatch,
):
    fetching, converting, beginning = [], [], []
    trainer = make()

    def data():
        for batch in batches([8] * 6):
            if trainer._train_step is not None:
                fetching.append(trainer._train_step.is_under_way)
            yield batch

    def watched(module, name, seen):
        function = getattr(module, name)

        def call(*args):
            seen.append(trainer._train_step.is_under_way)
            return function(*args)

        monkeypatch.setattr(module, name, call)

    watched(mlx_fit.step, "to_mlx", converting)
    watched(mx, "async_eval", beginning)
    trainer.fit(data(), verbose=0)
    assert fetching[1:] == converting[1:] == [True] * 5
    assert beginning == [False] * 6


def test_a_step_that_is_made_a_graph_early_holds_no_second_copy_of_the_state():
    """Its arrays are reused, as by hand: nothing but the graph waits for them."""

    class Peak(Callback):
        def on_epoch_begin(self, epoch, logs):
            mx.reset_peak_memory()
            self.before = mx.get_active_memory()

        def on_epoch_end(self, epoch, logs):
            self.taken = mx.get_peak_memory() - self.before

    def by_hand(model, optimizer):
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def loss_of(model, x, y):
            return (model(x) - y).square().mean()

        def update(x, y):
            loss, gradients = nn.value_and_grad(model, loss_of)(model, x, y)
            optimizer.update(model, gradients)
            return loss

        step = mx.compile(update, inputs=state, outputs=state)
        for _ in range(2):
            peak.on_epoch_begin(0, {})
            for x, y in data:
                mx.eval(state, step(mx.array(x), mx.array(y)))
            peak.on_epoch_end(0, {})

    peak, data = Peak(), [(np.zeros((8, 512), np.float32), np.zeros((8, 512), np.float32))] * 30
    by_hand(nn.Linear(512, 512), optim.AdamW(0.01))
    alone = peak.taken
    trainer = Trainer(nn.Linear(512, 512), optim.AdamW(0.01), "mse")
    trainer.fit(data, epochs=2, callbacks=peak, verbose=0)
    assert peak.taken < alone + 1_500_000  # a second copy of weights and moments has 3 million


def test_asynchronously_each_batch_is_started_and_one_long_before_is_waited_for(monkeypatch):
    waits = steady_waits(monkeypatch, make(), asynchronous=True)
    assert waits == ONE_WAIT_LATER


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
