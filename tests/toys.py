"""Small models and data with results that can be worked out by hand."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit import Callback, Trainer
from mlx_fit.callbacks.base import HOOKS


class Ones(nn.Module):
    """``y = x @ W`` with W all ones, shape (4, 3)."""

    def __init__(self):
        super().__init__()
        self.weight = mx.ones((4, 3))

    def __call__(self, x):
        return x @ self.weight


def rows_of_ones(count=10):
    """x of ones, y of zeros: with ``Ones`` each loss is 16.0, then 15.158046, 14.360396, ..."""
    return np.ones((count, 4), np.float32), np.zeros((count, 3), np.float32)


def batch_of(value, rows=2):
    """Rows that ``Ones`` maps to ``4 * value``, targets 0: the loss is (4 value)^2."""
    return np.full((rows, 4), value, np.float32), np.zeros((rows, 3), np.float32)


def ramp(num_batches=4):
    """Batches of 2 rows with the losses 0, 16, 64, 144, ..."""
    return [batch_of(i) for i in range(num_batches)]


def trainer_of(model=None, learning_rate=0.01, **options):
    """A trainer for the toys: MSE, SGD, batches of 4 rows."""
    options = {"loss": "mse", "metrics": ["mae"], "batch_size": 4} | options
    return Trainer(model or Ones(), optim.SGD(learning_rate), **options)


def still_trainer(**options):
    """A trainer that learns nothing, for looking at values."""
    return trainer_of(learning_rate=0.0, **options)


def weight_of(trainer):
    """The first weight of ``Ones``."""
    return trainer.model.weight[0, 0].item()


class Recorder(Callback):
    """Writes down every hook that is called, with its index if it has one."""

    def __init__(self):
        self.events = []

    @property
    def names(self):
        return [name for name, *_ in self.events]


def _recording(hook):
    def method(self, *args):
        self.events.append((hook.removeprefix("on_"), *(a for a in args if isinstance(a, int))))

    return method


for _hook in HOOKS:
    setattr(Recorder, _hook, _recording(_hook))


class Do(Callback):
    """Calls a function at a hook, at one index or always."""

    def __init__(self, hook, function, index=None):
        def method(*args):
            if index is None or args[0] == index:
                function(self.trainer)

        setattr(self, hook, method)


def raising(error):
    """A function that raises."""

    def function(*_):
        raise error

    return function


def stop(trainer):
    """What a callback does to end training."""
    trainer.stop_training = True


def scripted(monitor, values):
    """A callback that puts values into the epochs' logs; None leaves the key out."""

    class Scripted(Callback):
        def on_epoch_end(self, epoch, logs):
            logs.pop(monitor, None)
            if values[epoch] is not None:
                logs[monitor] = values[epoch]

    return Scripted()
