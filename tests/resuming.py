"""A run with everything that resume could get wrong, for the tests that stop it somewhere."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit import Callback, DataLoader, EarlyStopping, Trainer
from mlx_fit._tree import named_arrays
from mlx_fit.data import Map
from mlx_fit.schedules import warmup_cosine

ROWS, BATCH, EPOCHS = 32, 4, 2
STEPS_PER_EPOCH = ROWS // BATCH


class Net(nn.Module):
    """An MLP with what remembers: dropout (random key) and running statistics."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.BatchNorm(12)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(12, 3)

    def __call__(self, x):
        return self.last(self.drop(nn.relu(self.norm(self.first(x)))))


def rows():
    """Distinct rows, each with its number in the first column."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(ROWS, 6)).astype(np.float32)
    x[:, 0] = np.arange(ROWS)
    return x, rng.integers(0, 3, ROWS)


def noisy(sample, rng):
    """Augmentation that leaves the row's number alone."""
    x, y = sample
    noise = rng.normal(0, 0.1, 6).astype(np.float32)
    noise[0] = 0
    return x + noise, y


class Ids(Callback):
    """Notes the loss of each batch; with ``state``, over all processes."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, batch, logs):
        self.losses.append(logs.batch["loss"])

    def state_dict(self):
        return {"losses": list(self.losses)}

    def load_state_dict(self, state):
        self.losses = state["losses"]


class Run:
    """The run, made anew as in a fresh process: new model, optimizer, data, callbacks.

    Args:
        directory: its checkpoints.
        loader: a DataLoader with augmentation instead of arrays.
        trainer: more arguments of the trainer.
        fit: more arguments of ``fit``.
    """

    def __init__(self, directory=None, loader=False, trainer=None, **fit):
        mx.random.seed(11)
        model = Net()
        mx.eval(model.parameters())
        schedule = warmup_cosine(1e-2, 40, 4)
        options = {"metrics": ["accuracy"], "batch_size": BATCH, "seed": 5, "clip_norm": 1.0}
        optimizer = optim.AdamW(schedule)
        self.trainer = Trainer(model, optimizer, "cross_entropy", **options | (trainer or {}))
        self.ids = Ids()
        self.stopping = EarlyStopping("val_loss", patience=50, restore_best_weights=True)
        x, y = rows()
        self.train = (
            DataLoader(Map(list(zip(x, y, strict=True)), noisy), BATCH, shuffle=True, seed=9)
            if loader
            else (x, y)
        )
        self.val = (x[:10] * 0.5, y[:10])
        self.arguments = {"epochs": EPOCHS, "verbose": 0, "checkpoint_dir": directory} | fit
        self.history = None

    def go(self, *callbacks, **more):
        """Fit; keeps and returns the history."""
        arguments = self.arguments | more
        extra = arguments.pop("callbacks", [])
        watchers = [self.ids, self.stopping, *extra, *callbacks]
        self.history = self.trainer.fit(self.train, self.val, callbacks=watchers, **arguments)
        return self.history

    def outcome(self):
        """Everything that must be equal, in one dict of plain values."""
        trainer, history = self.trainer, self.history
        arrays = named_arrays([trainer.model.parameters(), trainer.optimizer.state])
        return {
            **{name: np.array(value).tobytes() for name, value in arrays},
            "random_key": mx.random.state[0].tolist(),
            "step": trainer.step,
            "losses": self.ids.losses,
            "history": history.history,
            "epoch": history.epoch,
            "rows": history.steps,
            "evaluations": history.evaluations,
            "wait": (self.stopping.wait, self.stopping.best, self.stopping.best_epoch),
        }


def differences(one, other):
    """Names of what is not equal in two outcomes."""
    return [name for name in one | other if one.get(name) != other.get(name)]
