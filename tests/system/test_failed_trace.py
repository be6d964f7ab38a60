"""A bug in the user's code: their exception, with the batch named, and a trainer that goes on."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fit import LambdaCallback, Trainer


class Net(nn.Module):
    """Dropout, BatchNorm and noise in every mode: everything that a failed call could spoil."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.4)
        self.fault = None

    def __call__(self, x):
        hidden = self.dropout(nn.relu(self.norm(self.first(x))))
        hidden = hidden + 0.1 * mx.random.normal(hidden.shape, hidden.dtype)
        if self.fault is not None:
            self.fault(hidden)
        return self.last(hidden)


def raise_key_error(hidden):
    raise KeyError("a bug of the user's")


def read_value(hidden):
    hidden.sum().item()


def wrong_shape(hidden):
    hidden @ mx.zeros((5, 5))


FAULTS = {
    "an exception": (raise_key_error, KeyError),
    ".item()": (read_value, ValueError),
    "a shape": (wrong_shape, ValueError),
}


def raises_where(test, fault):
    def act(hidden):
        if test(hidden):
            fault(hidden)

    return act


def make(options=None):
    mx.random.seed(1)
    model = Net()
    mx.eval(model.parameters())
    trainer = Trainer(model, optim.AdamW(0.01), "cross_entropy", ["accuracy"], **(options or {}))
    mx.random.seed(2)
    return trainer


def batches(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, n).astype(np.int32))
        for n in sizes
    ]


def everything(trainer):
    arrays = dict(tree_flatten(trainer.model.parameters()))
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(trainer.optimizer.state)}
    arrays["key"] = mx.random.state[0]
    return {name: np.array(value) for name, value in arrays.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


OPTIONS = [
    {},
    {"compile": False},
    {"gradient_accumulation": 2},
    {"precision": "mixed_bfloat16"},
    {"nonfinite": "skip", "clip_norm": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_bug_in_the_first_batch_leaves_everything_as_it_was(name, options):
    fault, kind = FAULTS[name]
    if name == ".item()" and not options.get("compile", True):
        pytest.skip("eager code may read values")
    trainer, never_failed = make(options), make(options)
    trainer.optimizer.init(trainer.model.trainable_parameters())
    before = everything(trainer)
    trainer.model.fault = fault
    with pytest.raises(kind) as caught:
        trainer.fit(batches([8, 8]), verbose=0)
    assert caught.type is kind
    assert any("(8, 4) float32" in note and "(8,)" in note for note in caught.value.__notes__)
    assert_same(everything(trainer), before)

    trainer.model.fault = None
    data = batches([8, 8, 8, 5], seed=3)
    trainer.fit(data, epochs=2, verbose=0)
    mx.random.seed(2)
    never_failed.fit(data, epochs=2, verbose=0)
    assert_same(everything(trainer), everything(never_failed))


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_a_bug_in_a_ragged_last_batch_of_a_later_epoch_costs_that_batch_alone(compile):
    """The batches before it have trained; the failing one has left no trace."""
    data, epochs = batches([8, 8, 5]), []
    trainer, short = make({"compile": compile}), make({"compile": compile})

    def second_epoch_fails():
        epochs.append(1)
        ragged = data[2] if len(epochs) < 2 else (data[2][0][:3], data[2][1][:3])
        yield from [*data[:2], ragged]

    trainer.model.fault = raises_where(lambda hidden: hidden.shape[0] == 3, raise_key_error)
    with pytest.raises(KeyError) as caught:
        trainer.fit(second_epoch_fails, epochs=4, verbose=0)
    assert any("(3, 4) float32" in note for note in caught.value.__notes__)
    trainer.model.fault = None
    assert trainer.step == 5
    trainer.fit(data, verbose=0)

    mx.random.seed(2)
    for part in (data, data[:2], data):
        short.fit(part, verbose=0)
    assert_same(everything(trainer), everything(short))


@pytest.mark.parametrize("where", ["evaluate", "predict", "fit", "test_on_batch"])
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_a_bug_in_evaluation_leaves_everything_as_it_was(where, compile):
    """In the second batch: the first has already drawn random numbers."""
    trainer, never_failed = make({"compile": compile}), make({"compile": compile})
    train, bad = batches([8, 8]), batches([8, 5], seed=4)
    trainer.fit(train, verbose=0)
    before = everything(trainer)
    trainer.model.fault = raises_where(lambda hidden: hidden.shape[0] == 5, raise_key_error)
    calls = {
        "evaluate": lambda: trainer.evaluate(bad, verbose=0),
        "predict": lambda: trainer.predict(bad, verbose=0),
        "fit": lambda: trainer.fit(train, bad, verbose=0),
        "test_on_batch": lambda: trainer.test_on_batch(*bad[1]),
    }
    with pytest.raises(KeyError) as caught:
        calls[where]()
    assert any("(5, 4) float32" in note for note in caught.value.__notes__)
    assert all(module.training for module in trainer.model.modules())
    trainer.model.fault = None
    if where != "fit":
        assert_same(everything(trainer), before)
    mx.random.seed(2)
    for _ in range(2 if where == "fit" else 1):
        never_failed.fit(train, verbose=0)
    assert_same(everything(trainer), everything(never_failed))


class Faulty(optim.SGD):
    """An optimizer that raises after it has changed part of its state."""

    fails = True

    def apply_single(self, gradient, parameter, state):
        updated = super().apply_single(gradient, parameter, state)
        if self.fails and gradient.ndim == 1:
            raise ZeroDivisionError("a bug of the user's")
        return updated


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_a_bug_in_the_optimizer_can_be_mended(compile, accumulation):
    options = {"compile": compile, "gradient_accumulation": accumulation}
    trainer, never_failed = make(options), make(options)
    trainer.optimizer = Faulty(0.1, momentum=0.9)
    never_failed.optimizer = optim.SGD(0.1, momentum=0.9)
    data = batches([8, 8])
    key = mx.random.state[0].tolist()
    weights = {k: np.array(v) for k, v in tree_flatten(trainer.model.trainable_parameters())}
    with pytest.raises(ZeroDivisionError):
        trainer.fit(data, verbose=0)
    assert_same(
        {k: np.array(v) for k, v in tree_flatten(trainer.model.trainable_parameters())}, weights
    )
    if accumulation == 1:
        assert mx.random.state[0].tolist() == key
        trainer.optimizer.fails = False
        trainer.fit(data, verbose=0)
        mx.random.seed(2)
        never_failed.fit(data, verbose=0)
        assert_same(everything(trainer), everything(never_failed))


def test_a_bug_in_a_callback_leaves_a_trainer_that_goes_on():
    def fail(batch, logs):
        raise OSError("a bug of the user's")

    trainer, short, data = make(), make(), batches([8, 8])
    with pytest.raises(OSError, match="a bug") as caught:
        trainer.fit(data, callbacks=LambdaCallback(on_train_batch_end=fail), verbose=0)
    assert not getattr(caught.value, "__notes__", [])
    trainer.fit(data, verbose=0)
    mx.random.seed(2)
    short.fit(data[:1], verbose=0)
    short.fit(data, verbose=0)
    trained = everything(trainer)
    assert all(np.isfinite(value).all() for value in trained.values())
    np.testing.assert_array_equal(trained["optimizer.step"], 3)


def test_a_keyboard_interrupt_while_tracing_leaves_everything_as_it_was():
    trainer = make()
    trainer.optimizer.init(trainer.model.trainable_parameters())
    before = everything(trainer)

    def interrupt(hidden):
        raise KeyboardInterrupt

    trainer.model.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(batches([8]), verbose=0)
    assert_same(everything(trainer), before)
