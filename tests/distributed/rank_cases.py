"""What ranks do in the tests, by name. Run as a script in each of them; results go out as JSON.

The same functions run in one process as well, for the numbers to compare with.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

import mlx_fit
from mlx_fit import (
    Callback,
    CausalLM,
    CheckpointPolicy,
    CSVLogger,
    DataLoader,
    DistributedTrainer,
    EarlyStopping,
    JSONLogger,
    ModelCheckpoint,
    Predictions,
    SyncPolicy,
    TensorBoard,
)
from mlx_fit.communicator import gather
from mlx_fit.distributed import DiLoCo, LocalSGD, ShardedOptimizer, SyncMonitor
from mlx_fit.distributed.aligning import digest
from mlx_fit.distributed.buckets import Buckets
from mlx_fit.errors import NonFiniteLossError
from mlx_fit.text import BucketBatches

RANK = int(os.environ.get("MLX_RANK", "0"))
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def rows(count=101, seed=0, outputs=4):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 8)).astype(np.float32)
    return x, rng.integers(0, outputs, count)


def mlp(seed=0, *layers):
    mx.random.seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *layers, nn.Linear(16, 4))


def weights(model):
    return {name: np.array(value).tolist() for name, value in tree_flatten(model.parameters())}


def trainer_of(model=None, optimizer=None, loss="cross_entropy", metrics=("accuracy",), **options):
    options = {"batch_size": 12, "seed": 1} | options
    model = mlp() if model is None else model
    optimizer = optim.SGD(0.1) if optimizer is None else optimizer
    return DistributedTrainer(model, optimizer, loss, list(metrics), **options)


def fitted(trainer, data=None, epochs=2, **options):
    history = trainer.fit(rows() if data is None else data, epochs=epochs, verbose=0, **options)
    return {
        "history": history.history,
        "weights": weights(trainer.model),
        "step": trainer.step,
        "updates": int(trainer.optimizer.step.item()),
        "stopped_by": history.stopped_by,
        "steps": history.steps,
    }


# --- equal to one process -------------------------------------------------------------------------


@case
def sgd(folder):
    return fitted(trainer_of(optimizer=optim.SGD(0.1, momentum=0.9)), epochs=3, log_every=1)


@case
def adamw_with_validation(folder):
    trainer = trainer_of(optimizer=optim.AdamW(1e-3), clip_norm=0.5)
    return fitted(trainer, val=rows(33, seed=5), epochs=3)


@case
def accumulated(folder):
    return fitted(trainer_of(gradient_accumulation=4, batch_size=8), log_every=1)


@case
def weighted(folder):
    x, y = rows()
    weights = np.linspace(0, 3, len(y)).astype(np.float32)
    return fitted(trainer_of(), (x, y, weights))


@case
def ignored_labels(folder):
    x, y = rows(60)
    y = np.where(np.arange(60) % 12 < 7, -100, y)  # one rank's share counts much less
    y[12:24] = -100  # and a whole batch nothing
    return fitted(trainer_of(seed=1), (x, y), shuffle=False)


@case
def class_weights(folder):
    return fitted(trainer_of(), class_weight={0: 3.0, 1: 0.5})


@case
def function_objective(folder):
    def objective(model, batch):
        x, y = batch
        losses = nn.losses.cross_entropy(model(x), y)
        kept = (y != 3).astype(mx.float32)
        return mlx_fit.Sums((losses * kept).sum(), kept.sum(), {"kept": (kept.sum(), kept.sum())})

    trainer = DistributedTrainer(
        mlp(), optim.SGD(0.1), objective=objective, batch_size=12, seed=1, clip_norm=1.0
    )
    x, y = rows(36)
    y[12:24] = 3  # a batch of no weight, which only the device knows
    return fitted(trainer, (x, y), shuffle=False)


@case
def fewer_rows_than_ranks(folder):
    x, y = rows(9)
    trainer = trainer_of(batch_size=2, clip_norm=1.0, metrics=("accuracy", "auroc"))
    return fitted(trainer, (x, y), val=(x[:3], y[:3]), shuffle=False)


@case
def frozen_half(folder):
    model = mlp()
    model.layers[0].freeze()
    return fitted(trainer_of(model))


@case
def mixed_precision(folder):
    return fitted(trainer_of(precision="mixed_float16"))


@case
def loader(folder):
    data = DataLoader(rows(), batch_size=12, shuffle=True)  # each rank draws another seed
    trainer = trainer_of()
    found = fitted(trainer, data)
    return found | {"state": {k: v for k, v in data.state_dict().items() if k != "seed"}}


@case
def epochs_of_steps(folder):
    return fitted(trainer_of(), steps_per_epoch=5, epochs=4)


class Bigrams(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)

    def __call__(self, tokens):
        return self.head(self.embedding(tokens))


@case
def language_model(folder):
    """Batches of tokens by length; each rank draws another seed."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 37)
    items = [(rng.integers(0, 20, n), rng.integers(0, 2, n)) for n in lengths]
    mx.random.seed(0)
    batches = BucketBatches(items, batch_size=8, seed=7 if RANK == 0 else None)
    trainer = DistributedTrainer(
        Bigrams(), optim.Adam(1e-2), objective=CausalLM(), clip_norm=1.0, seed=1
    )
    return fitted(trainer, batches)


@case
def own_predictions(folder):
    """One rank alone asks for outputs in the middle of training, and a callback does on rank 0."""
    x, y = rows(30)
    shapes = []

    class Look(Callback):
        def on_train_batch_end(self, batch, logs):
            if RANK == 1:
                shapes.append(self.trainer.predict_on_batch(x[:3]).shape)

    table = Predictions((x[:4], y[:4]), folder / "board")
    found = fitted(trainer_of(), (x, y), callbacks=[Look(), table])
    return {"history": found["history"], "shapes": shapes}


class SlowRows:
    """Rows that take rank 1 three times as long; it notes how many each batch had."""

    def __init__(self, seconds):
        self.x, self.y = rows(96)
        self.seconds = seconds * (3 if RANK else 1)
        self.sizes = []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]

    def __getitems__(self, indices):
        self.sizes.append(len(indices))
        time.sleep(self.seconds * len(indices))
        return self.x[indices], self.y[indices]


@case
def balanced(folder):
    data = SlowRows(0.004)
    trainer = trainer_of(batch_size=32, balance=True)
    loader = DataLoader(data, batch_size=32, shuffle=True, seed=3, prefetch_factor=0)
    found = fitted(trainer, loader, epochs=3, val=rows(33, seed=5), log_every=1)
    ahead = SlowRows(0.004)  # read by a thread, whose time nobody sees
    trainer_of(batch_size=32, balance=True).fit(ahead, epochs=5, verbose=0)
    rates = trainer.communicator.rates
    return found | {"sizes": data.sizes, "sizes_ahead": ahead.sizes, "rates": rates}


@case
def balanced_own_data(folder):
    trainer = trainer_of(balance=True)
    try:
        trainer.fit([rows(4)], verbose=0)
    except mlx_fit.ConfigurationError as error:
        return str(error)


# --- what one process has no counterpart of -------------------------------------------------------


def own_batches(counts):
    """Batches of 4 rows of each rank's own: so many for rank 0, so many for rank 1."""
    x, y = rows(4 * sum(counts))
    start = 4 * sum(counts[:RANK])
    return [(x[i : i + 4], y[i : i + 4]) for i in range(start, start + 4 * counts[RANK], 4)]


@case
def uneven_joined(folder):
    return fitted(trainer_of(), lambda: iter(own_batches((10, 7))), epochs=2)


@case
def uneven_stopped(folder):
    return fitted(trainer_of(uneven="stop"), own_batches((10, 7)), epochs=2)


@case
def accumulated_uneven(folder):
    return fitted(trainer_of(gradient_accumulation=3), own_batches((5, 3)), epochs=2)


@case
def other_weights(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(mlp(seed=RANK))
    return {"weights": weights(trainer.model), "warnings": [str(w.message) for w in caught]}


class Masks(nn.Module):
    """Remembers which inputs its dropout has kept."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self._seen = mx.zeros((6, 8))

    def __call__(self, x):
        x = self.dropout(x)
        self._seen = x
        return x


def masks(log_every):
    model = nn.Sequential(Masks(), nn.Linear(8, 4))
    mx.random.seed(0)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, batch, logs):
            seen.append((np.array(model.layers[0]._seen) != 0).astype(int).tolist())

    x, y = np.ones((48, 8), np.float32), np.zeros(48, np.int64)
    trainer = trainer_of(model)
    trainer.fit((x, y), callbacks=Look(), verbose=0, log_every=log_every)
    return seen, mx.random.state[0].tolist()


@case
def dropout(folder):
    return [masks(1), masks(1), masks(100)]


@case
def batch_norm(folder):
    model = nn.Sequential(nn.BatchNorm(8), nn.Linear(8, 4))
    x, y = rows(9)  # shares of 5 and 4 rows
    trainer_of(model, optim.SGD(0.0), batch_size=9).fit((x, y), shuffle=False, verbose=0)
    return weights(model)


@case
def early_stopping(folder):
    trainer = trainer_of(optimizer=optim.SGD(0.0))
    return fitted(trainer, val=rows(33), epochs=9, callbacks=EarlyStopping(patience=2))


class Ask(Callback):
    """Asks for the end on one rank, after one batch."""

    def __init__(self, rank, batch):
        self.at = rank, batch

    def on_train_batch_end(self, batch, logs):
        if (RANK, batch) == self.at:
            self.trainer.request_stop("enough")


@case
def stop_on_one_rank(folder):
    return fitted(trainer_of(), callbacks=Ask(1, 3))


@case
def stop_between_epochs(folder):
    class AskLater(Callback):
        def on_epoch_end(self, epoch, logs):
            if RANK == 1 and epoch == 1:
                self.trainer.stop_training = True

    return fitted(trainer_of(), epochs=5, callbacks=AskLater())


def with_nan_on_rank_1(count=48):
    x, y = rows(count)
    x[12 * 2 + 7] = np.nan  # in the third batch, where rank 1 has its share
    return x, y


@case
def nan_raises(folder):
    trainer = trainer_of()
    try:
        trainer.fit(with_nan_on_rank_1(), shuffle=False, verbose=0, log_every=1)
    except NonFiniteLossError as error:
        return {"step": error.step, "done": trainer.step}


@case
def nan_skipped(folder):
    return fitted(trainer_of(nonfinite="skip"), with_nan_on_rank_1(), shuffle=False)


@case
def one_sum_an_update(folder):
    counts = []
    for accumulation in (1, 4):
        trainer = trainer_of(gradient_accumulation=accumulation)
        before = trainer.communicator.num_collectives
        trainer.fit(rows(96), epochs=1, verbose=0)  # 8 batches
        counts.append(trainer.communicator.num_collectives - before)
    return counts


@case
def half_precision_sums(folder):
    found = {}
    for dtype in (None, "bfloat16", "float16"):
        trainer = trainer_of(sync=SyncPolicy(reduce_dtype=dtype))
        before = trainer.communicator.num_bytes
        trainer.train_on_batch(*(part[RANK * 6 : RANK * 6 + 6] for part in rows(12)))
        sent = trainer.communicator.num_bytes - before
        found[str(dtype)] = {"weights": weights(trainer.model), "bytes": sent}
    return found


@case
def buckets(folder):
    found = {}
    for size in (0, 1 / 1024, 1, 32):
        trainer = trainer_of(sync=SyncPolicy(bucket_mb=size))
        found[str(size)] = fitted(trainer, epochs=1)["weights"]
    return found


@case
def bytes_of_a_sum(folder):
    """The most memory that a sum of gradients takes beside these, in their size."""
    trainer = trainer_of()
    gradients = {str(i): mx.ones((1000, 100)) * i for i in range(4)}
    mx.eval(gradients)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sums = Buckets(SyncPolicy()).summed(trainer.communicator, gradients)
    mx.eval(sums)
    taken = mx.get_peak_memory() - before
    found = {name: value.min().item() for name, value in sums.items()}
    return {"share": taken / 1_600_000, "sums": found, "kept": gradients["3"].max().item()}


class WaitsAtOnce(Callback):
    def on_train_begin(self, logs):
        self.trainer._train_step._overlaps = False


@case
def overlapped(folder):
    """The next batch is fetched while the update is computed, or after it."""
    runs = []
    for callbacks in ((), (WaitsAtOnce(),)):
        trainer = trainer_of(
            mlp(0, nn.BatchNorm(16), nn.Dropout(0.2)), optim.AdamW(0.01), gradient_accumulation=2
        )
        runs.append(fitted(trainer, callbacks=list(callbacks)))
    return {"same": runs[0] == runs[1], "overlaps": trainer_of()._new_train_step()._overlaps}


class SaveInWindow(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, batch, logs):
        if batch == 4 and self.trainer.epoch == 0:  # the second of three batches of a window
            self.trainer.save(self.path)


@case
def saved_in_a_window(folder):
    def make():
        optimizer = optim.AdamW(0.01)
        return trainer_of(
            optimizer=optimizer, gradient_accumulation=3, metrics=("accuracy", "auroc")
        )

    whole = fitted(make(), rows(96), callbacks=SaveInWindow(folder / "saved"))
    other = {"checkpoint_dir": folder / "other", "resume": folder / "saved"}
    return {"whole": whole, "resumed": fitted(make(), rows(96), **other)}


@case
def statistics_saved_in_a_window(folder):
    """BatchNorm, and shares of 5 and 4 rows; rank 0 alone looks at what was saved."""
    own = []

    class Own(Callback):
        def on_train_batch_end(self, batch, logs):
            if batch == 4 and self.trainer.epoch == 0:
                own.append(np.array(self.model.layers[0].running_mean).tolist())

    def make():
        model = nn.Sequential(nn.BatchNorm(8), nn.Linear(8, 4))
        return trainer_of(model, optim.AdamW(0.01), gradient_accumulation=3, batch_size=9)

    trainer = make()
    whole = fitted(trainer, rows(81), callbacks=[SaveInWindow(folder / "saved"), Own()])
    saved = mx.load(str(folder / "saved" / "model.safetensors"))
    other = {"checkpoint_dir": folder / "other", "resume": folder / "saved"}
    return {
        "own": own[0],
        "saved": saved["layers.0.running_mean"].tolist(),
        "whole": whole,
        "resumed": fitted(make(), rows(81), **other),
    }


# --- saving ---------------------------------------------------------------------------------------


def error_of(function):
    try:
        function()
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}


@case
def files(folder):
    """Everything that writes; rank 1 must open nothing for writing."""
    opened = []

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and str(folder) in arguments[0]:
            if isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
                opened.append(arguments[0])
        elif event in ("os.mkdir", "os.rename") and str(folder) in str(arguments[0]):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    callbacks = [
        CSVLogger(folder / "log.csv"),
        JSONLogger(folder / "log.jsonl"),
        TensorBoard(folder / "board"),
        ModelCheckpoint(folder / "best.safetensors", save_best_only=True),
        ModelCheckpoint(folder / "all", monitor="loss"),
    ]
    trainer = trainer_of(optimizer=optim.Adam(1e-2), metrics=("accuracy", "auroc"))
    policy = CheckpointPolicy("3 steps", keep_last=None)
    options = {"checkpoint_dir": folder / "checkpoints", "checkpoint_every": policy}
    fitted(trainer, val=rows(33), callbacks=callbacks, **options)
    trainer.save(folder / "saved")
    other = trainer_of(mlp(seed=3), optim.Adam(1e-2))
    other.load(folder / "saved")  # complete as soon as save has returned on any rank
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    same = weights(other.model) == weights(trainer.model)
    return {"opened": opened, "same": same, "names": names}


@case
def full_disk(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").touch()
    trainer = trainer_of()
    inside = folder / "file" / "inside"
    return [
        error_of(lambda: trainer.save(inside)),
        error_of(lambda: trainer.save_weights(folder / "file" / "w.safetensors")),
        error_of(lambda: fitted(trainer, callbacks=ModelCheckpoint(inside))),
        error_of(lambda: fitted(trainer_of(), checkpoint_dir=inside)),
        error_of(lambda: trainer.load(folder / "nothing")),
        fitted(trainer, epochs=1)["history"]["loss"],  # and all of them can go on
    ]


@case
def elastic(folder):
    """Five more steps than there are checkpoints for, whoever wrote these."""
    done = max([int(p.name[5:]) for p in (folder / "run").glob("step-*")], default=0)
    seen = []

    def objective(model, batch):
        x, y = batch
        return nn.losses.cross_entropy(model(x[:, :8]), y, reduction="mean")

    x, y = rows(70)
    x = np.concatenate([x, np.arange(70, dtype=np.float32)[:, None]], axis=1)

    def collate(samples):
        seen.append(sorted(int(sample[0][8]) for sample in samples))
        return np.stack([s[0] for s in samples]), np.array([s[1] for s in samples])

    data = [(x[i], y[i]) for i in range(70)]
    # Nothing is read ahead: what is seen would depend on time.
    options = {"shuffle": True, "seed": 4, "collate_fn": collate, "prefetch_factor": 0}
    loader = DataLoader(DataSet(data), batch_size=30, **options)
    model = nn.Sequential(nn.Dropout(0.0), mlp())
    schedule = optim.cosine_decay(1e-2, 15)
    trainer = DistributedTrainer(model, optim.AdamW(schedule), objective=objective, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other ranks' number of rows, and so on
        trainer.fit(
            loader,
            epochs=10,
            max_steps=done + 5,
            verbose=0,
            checkpoint_dir=folder / "run",
            resume="auto",
        )
    return {
        "seen": seen,
        "weights": weights(model),
        "updates": int(trainer.optimizer.step.item()),
        "rate": float(trainer.optimizer.learning_rate.item()),
        "loss": trainer.history.history,
    }


class DataSet:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


# --- strategies -----------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda: optim.SGD(0.1, momentum=0.9),
    "adamw": lambda: optim.AdamW(optim.cosine_decay(1e-2, 20)),
    "lion": lambda: optim.Lion(1e-3),
    "adagrad": lambda: optim.Adagrad(1e-2),
    "rmsprop": lambda: optim.RMSprop(1e-3),
    "adadelta": lambda: optim.AdaDelta(1.0),
    "adamax": lambda: optim.Adamax(1e-2),
    "adafactor": lambda: optim.Adafactor(1e-2, relative_step=False, scale_parameter=False),
    "muon": lambda: optim.Muon(1e-2),
}


@case
def zero1(folder):
    """Weights by data_parallel, and by zero1, for each optimizer."""
    found = {}
    for name, make in OPTIMIZERS.items():
        found[name] = []
        for strategy in ("data_parallel", "zero1"):
            trainer = trainer_of(optimizer=make(), strategy=strategy, clip_norm=1.0)
            run = fitted(trainer, rows(24), epochs=2)
            own = sum(v.size for _, v in tree_flatten(trainer.optimizer.state))
            found[name].append([run["weights"], run["history"], own])
    return found


@case
def zero1_checkpoints(folder):
    found = {}
    for strategy in ("data_parallel", "zero1", "parameter_server"):
        trainer = trainer_of(optimizer=optim.AdamW(1e-2), strategy=strategy)
        fitted(trainer, rows(36), epochs=1)
        trainer.save(folder / strategy)
        # Another trainer goes on from it, by another strategy.
        other = trainer_of(mlp(seed=5), optim.AdamW(1e-2), strategy="zero1")
        again = fitted(other, rows(36), epochs=2, resume=folder / strategy)
        found[strategy] = {"weights": again["weights"], "updates": again["updates"]}
    files = [folder / s / "optimizer.safetensors" for s in ("data_parallel", "zero1")]
    one, two = (mx.load(str(path)) for path in files)
    found["equal"] = one.keys() == two.keys() and all(
        mx.array_equal(one[k], two[k]).item() for k in one
    )
    return found


@case
def zero1_thawed(folder):
    """What is trained changes, so its state is divided anew."""
    found = []
    for strategy in ("data_parallel", "zero1"):
        model = mlp()
        model.layers[0].freeze()
        trainer = trainer_of(model, optim.Adam(1e-2), strategy=strategy)
        found.append(fitted(trainer, rows(24), epochs=3, callbacks=Thaw())["weights"])
    return found


class Thaw(Callback):
    def on_epoch_begin(self, epoch, logs):
        if epoch == 1:
            self.model.layers[0].unfreeze()


@case
def parameter_server(folder):
    trainer = trainer_of(optimizer=optim.AdamW(1e-2), strategy="parameter_server")
    run = fitted(trainer, rows(24))
    return {"run": run, "state": len(tree_flatten(trainer.optimizer.state))}


class Weights(Callback):
    """Notes whether ranks have equal weights after each update."""

    def __init__(self):
        self.equal = []

    def on_train_batch_end(self, batch, logs):
        first, second = gather(self.trainer.communicator, digest(self.model.parameters()))
        self.equal.append(first == second)


@case
def local_sgd(folder):
    """20 updates: two meetings, and one at the end."""
    found = {}
    for strategy in (LocalSGD(8), DiLoCo(8, 1.0, 0.0), DiLoCo(8)):
        trainer = trainer_of(optimizer=optim.SGD(0.05), strategy=strategy, batch_size=4)
        look = Weights()
        run = fitted(trainer, rows(80), epochs=1, callbacks=look)
        found[f"{strategy.name}{len(found)}"] = {"weights": run["weights"], "equal": look.equal}
        ends = gather(trainer.communicator, digest(trainer.model.parameters()))
        found[f"{strategy.name}{len(found) - 1}"]["ends"] = len(set(ends))
    return found


@case
def diloco_resumed(folder):
    """The state of a round is in a checkpoint."""
    options = {"strategy": DiLoCo(8), "batch_size": 4}
    trainer = trainer_of(optimizer=optim.SGD(0.05), **options)
    looked = {}

    class Save(Callback):
        def on_train_batch_end(self, batch, logs):
            if batch == 10:
                self.trainer.save(folder / "inside")
                looked.update(options["strategy"].state_dict(self.trainer.communicator))

    fitted(trainer, rows(80), epochs=1, callbacks=Save())
    strategy = DiLoCo(8)
    other = trainer_of(optimizer=optim.SGD(0.05), strategy=strategy, batch_size=4)
    seen = {}

    class Look(Callback):
        def on_train_batch_begin(self, batch, logs):
            seen.update({} if seen else strategy.state_dict(other.communicator))

    fitted(other, rows(80), epochs=1, callbacks=Look(), resume=folder / "inside")
    names = looked["anchor"].keys()
    return {
        "num_updates": [looked["num_updates"], seen["num_updates"]],
        "names": sorted(names) == sorted(seen["anchor"]) == sorted(seen["velocity"]),
        "anchor": all(mx.array_equal(looked["anchor"][n], seen["anchor"][n]).item() for n in names),
        "velocity": all(
            mx.array_equal(looked["velocity"][n], seen["velocity"][n]).item() for n in names
        ),
        "step": other.step,
    }


def hand_written(optimizer, size):
    """Four steps over 12 rows, split unevenly: rank 0 has 9 of them."""
    model = mlp()
    x, y = (mx.array(part) for part in rows(12))
    own = slice(None) if size == 1 else slice(9 * RANK, 9 + 3 * RANK)

    def loss(x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    step = nn.value_and_grad(model, loss)
    for _ in range(4):
        _, gradients = step(x[own], y[own])
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.update(model, gradients, weight=len(y[own].tolist()))
        else:
            optimizer.update(model, gradients)
    return weights(model)


@case
def sharded_optimizer(folder):
    optimizer = ShardedOptimizer(optim.AdamW(1e-2))
    found = {"weights": hand_written(optimizer, optimizer.size)}
    whole = optimizer.whole_state()
    found["state"] = {name: np.array(value).tolist() for name, value in whole.items()}
    other = ShardedOptimizer(optim.AdamW(1e-2))
    other.load_whole_state(mlp().trainable_parameters(), whole)
    again = other.whole_state()
    found["again"] = all(mx.array_equal(again[name], whole[name]).item() for name in whole)
    return found


@case
def desync(folder):
    class Flip(Callback):
        def on_train_batch_end(self, batch, logs):
            if RANK == 1 and self.trainer.step == 7:
                weight = self.model.layers[2].weight
                words = weight.view(mx.uint32)
                words[1, 3] = words[1, 3] ^ mx.array(1, mx.uint32)
                self.model.layers[2].weight = words.view(mx.float32)

    trainer = trainer_of(optimizer=optim.SGD(0.01), sync=SyncPolicy(check_every=5))
    error = error_of(lambda: fitted(trainer, epochs=3, callbacks=Flip()))
    return error | {"steps": trainer.step}


@case
def compression(folder):
    """50 sums of gradients that change little by little."""
    ring = trainer_of().communicator
    both = []
    for rank in (0, 1):
        rng = np.random.default_rng(rank)
        shapes = {"w": (40, 30), "b": 9, "k": (2, 2)}
        both.append({key: rng.normal(size=shape) for key, shape in shapes.items()})
    base = both[RANK]
    found = {}
    for name in ("int8", "powersgd:2"):
        buckets = Buckets(SyncPolicy(compress=name))
        applied, true = ({k: np.zeros(v.shape) for k, v in base.items()} for _ in range(2))
        first_error, before = None, ring.num_bytes
        for step in range(50):
            factor = 1 + 0.01 * step
            own = {k: mx.array(v * factor, mx.float32) for k, v in base.items()}
            sums, _ = buckets.sum(ring, own, {}, 2.0)
            for key in base:
                applied[key] += np.array(sums[key])
                true[key] += (both[0][key] + both[1][key]) * factor
            if first_error is None:
                first_error = {k: np.abs(applied[k] - true[k]).max() for k in base}
        found[name] = {
            "bytes": (ring.num_bytes - before) / 50,
            "first": first_error,
            "last": {k: float(np.abs(applied[k] - true[k]).max()) for k in base},
            "size": {k: float(np.abs(true[k]).max() / 50) for k in base},
            "digest": digest({k: mx.array(v) for k, v in applied.items()}),
        }
    return found


@case
def compressed_runs(folder):
    found = {}
    for name in (None, "int8", "powersgd:2"):
        trainer = trainer_of(optimizer=optim.SGD(0.1), sync=SyncPolicy(compress=name))
        found[str(name)] = fitted(trainer, rows(48), epochs=4)
        if name is not None:
            saved = folder / name.replace(":", "")
            part = trainer_of(optimizer=optim.SGD(0.1), sync=SyncPolicy(compress=name))
            fitted(part, rows(48), epochs=2, checkpoint_dir=saved)
            rest = trainer_of(optimizer=optim.SGD(0.1), sync=SyncPolicy(compress=name))
            found[f"{name} resumed"] = fitted(
                rest, rows(48), epochs=4, checkpoint_dir=saved, resume=True
            )
    return found


@case
def watched(folder):
    """Rank 1 sleeps before each update."""

    class Sleep(Callback):
        def on_train_batch_begin(self, batch, logs):
            if RANK == 1:
                time.sleep(0.05)

    monitor = SyncMonitor()
    trainer = trainer_of()
    fitted(trainer, rows(48), epochs=1)  # everything is compiled
    before = trainer.communicator.num_collectives
    trainer.fit(rows(48), verbose=0)
    plain = trainer.communicator.num_collectives - before
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = fitted(trainer, rows(48), epochs=2, callbacks=[Sleep(), monitor])
    own_wait_ms = monitor.wait_ms
    before = trainer.communicator.num_collectives
    trainer.fit(rows(48), verbose=0, callbacks=monitor)
    return {
        "wait_ms": run["history"]["sync.wait_ms"],
        "own_wait_ms": own_wait_ms,
        "straggler": run["history"]["sync.straggler"],
        "share": run["history"]["sync.share"],
        "mb": run["history"]["sync.mb"],
        "printed": printed.getvalue(),
        "collectives": trainer.communicator.num_collectives - before - plain,
    }


@case
def out_of_step(folder):
    trainer = trainer_of()
    if RANK == 0:
        return error_of(lambda: trainer.evaluate(rows(12), verbose=0))
    return error_of(lambda: trainer.save_weights(folder / "w.safetensors"))


class OnOneRank(Callback):
    def __init__(self, rank, act):
        self.rank, self.act = rank, act

    def on_train_batch_end(self, batch, logs):
        if self.rank == RANK and batch == 2:
            self.act(self.trainer)


def on_one_rank(rank, act):
    return error_of(lambda: fitted(trainer_of(), rows(96), callbacks=OnOneRank(rank, act)))


@case
def saved_by_rank_0_alone(folder):
    return on_one_rank(0, lambda trainer: trainer.save_weights(folder / "w.safetensors"))


@case
def evaluated_by_rank_1_alone(folder):
    return on_one_rank(1, lambda trainer: trainer.evaluate(rows(24), verbose=0))


@case
def other_arguments(folder):
    return [
        error_of(lambda: trainer_of(batch_size=12 + RANK)),
        error_of(lambda: trainer_of(strategy=LocalSGD(8 + RANK))),
        error_of(lambda: fitted(trainer_of(), epochs=2 + RANK)),
        error_of(lambda: fitted(trainer_of(), rows(40 + RANK))),
        error_of(lambda: trainer_of(optimizer=optim.SGD(0.1 + RANK))),
        error_of(
            lambda: trainer_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16 + RANK, 4)))
        ),
    ]


# --- evaluation and prediction --------------------------------------------------------------------


@case
def evaluation(folder):
    trainer = trainer_of(metrics=("accuracy", "confusion_matrix", "auroc"))
    found = trainer.evaluate(rows(), batch_size=8, verbose=0)
    return {key: np.asarray(value).tolist() for key, value in found.items()}


@case
def prediction(folder):
    trainer = trainer_of()
    x, _ = rows()
    batches = [len(batch) for batch in trainer.predict_batches(x, batch_size=10, verbose=0)]
    return {"outputs": trainer.predict(x, batch_size=8, verbose=0).tolist(), "batches": batches}


@case
def own_lists(folder):
    x, y = rows(20)
    own = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 20, 2)][RANK::2]
    trainer = trainer_of()
    found = trainer.evaluate(own, verbose=0)
    return found | {"outputs": trainer.predict(own, verbose=0).tolist()}


# --- runs that end --------------------------------------------------------------------------------


class SendSignal(Callback):
    def on_train_batch_end(self, batch, logs):
        if RANK == 1 and batch == 6:
            os.kill(os.getpid(), signal.SIGTERM)


@case
def terminated(folder):
    """SIGTERM to rank 1 after its seventh step."""
    options = {"checkpoint_dir": folder / "run", "checkpoint_every": "100 steps"}
    fitted(trainer_of(), callbacks=SendSignal(), **options)


ENDING = ("terminated",)


def main():
    folder = Path(sys.argv[1])
    results = {}
    for name in sys.argv[2:]:
        results[name] = CASES[name](folder / name)
    (folder / f"rank{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
