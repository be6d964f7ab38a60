"""What ranks do in the tests of memory that runs out on one of them. Run as a script in each."""

from __future__ import annotations

import gc
import socket
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from rank_cases import RANK, case, main, rows, trainer_of, weights

from mlx_fit import DeviceConfig
from mlx_fit.distributed import LocalSGD
from mlx_fit.runtime import memory
from mlx_fit.step import TrainStep

FULL = "[malloc] Unable to allocate 9000 bytes."


class Net(nn.Module):
    """Dropout and BatchNorm, and a device that has room for ``room`` rows only."""

    def __init__(self, room=None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm(16), nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.4)
        self.room = room

    def __call__(self, x):
        if self.training and self.room is not None and x.shape[0] > self.room:
            raise RuntimeError(FULL)
        return self.last(self.norm(self.dropout(nn.relu(self.first(x)))))


def net(room=None):
    mx.random.seed(1)
    model = Net(room)
    mx.eval(model.parameters())
    return model


def own_batches(size, count=48):
    """This rank's part of the data, in batches."""
    x, y = rows(2 * count, seed=3)
    x, y = x[RANK * count : (RANK + 1) * count], y[RANK * count : (RANK + 1) * count]
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]


def fitted(trainer, data, epochs=2, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.fit(data, epochs=epochs, verbose=0, **options)
    return {
        "history": history.history,
        "weights": weights(trainer.model),
        "key": mx.random.state[0].tolist(),
        "size": trainer.micro_batch_size,
        "step": trainer.step,
        "said": [str(warning.message) for warning in caught],
    }


def trained(room, size, accumulation, data=None, strategy="data_parallel", **options):
    trainer = trainer_of(
        net(room),
        optim.AdamW(0.01),
        gradient_accumulation=accumulation,
        strategy=strategy,
        **options,
    )
    return fitted(trainer, own_batches(size) if data is None else data)


def room_on_rank_1(room):
    return room if RANK == 1 else None


@case
def split_at_dispatch(folder):
    """Rank 1 has room for 3 rows; the reference begins with batches of 2 on both."""
    found = {}
    for accumulation in (1, 3):
        split = trained(room_on_rank_1(3), 8, accumulation, on_oom="split")
        small = trained(None, 2, 4 * accumulation)
        found[str(accumulation)] = {"split": split, "small": small}
    return found


@case
def split_shares(folder):
    """Batches that the trainer splits, in parts on both ranks, and whole."""
    data = rows(101)
    found = {}
    for strategy in ("data_parallel", "zero1", "parameter_server", "local_sgd"):
        named = LocalSGD(2) if strategy == "local_sgd" else strategy
        same = {"size": 8, "accumulation": 2, "data": data, "strategy": named, "on_oom": "split"}
        found[strategy] = trained(room_on_rank_1(3), **same)
        found[f"{strategy}, begun with it"] = trained(3, **same | {"strategy": again(named)})
    return found


def again(strategy):
    return strategy if isinstance(strategy, str) else type(strategy)(strategy.every)


class Failing:
    """Gradients of more than ``room`` rows fail when they are evaluated, from part ``first`` on."""

    def __init__(self, room, first):
        self.room, self.first = room, first

    def __enter__(self):
        self.before = take, wait = TrainStep.__call__, TrainStep.wait_for_gradients
        sizes = []

        def noted(step, batch):
            sizes.append(0 if batch is None else len(batch[0]))
            return take(step, batch)

        def failing(step):
            if self.room is not None and len(sizes) > self.first and sizes[-1] > self.room:
                raise RuntimeError(FULL)
            wait(step)

        TrainStep.__call__, TrainStep.wait_for_gradients = noted, failing

    def __exit__(self, *_):
        TrainStep.__call__, TrainStep.wait_for_gradients = self.before


@case
def split_late(folder):
    """Memory runs out in the middle of the second window; or on all ranks where it begins."""
    found = {}
    for name, room, first in (("middle", room_on_rank_1(5), 4), ("begin", 5, 3)):
        with Failing(room, first):
            found[name] = trained(None, 8, 3, on_oom="split")
    return found


@case
def split_uneven(folder):
    """Rank 0 has twice as many batches; rank 1 is the one without room."""
    own = own_batches(8)[: 6 if RANK == 0 else 3]
    trainer = trainer_of(net(room_on_rank_1(3)), on_oom="split", gradient_accumulation=2)
    return fitted(trainer, own)


def wide():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 4))
    mx.eval(model.parameters())
    return model


@case
def split_foreseen(folder):
    """A memory limit on rank 1 alone."""
    model = wide()
    limit = mx.get_active_memory() + 3_000_000
    config = DeviceConfig(memory_limit=limit) if RANK == 1 else None
    trainer = trainer_of(
        model, optim.AdamW(0.01), batch_size=4096, on_oom="split", device_config=config
    )
    return fitted(trainer, rows(4096))


@case
def sums_of_windows(folder):
    """Collectives of a fit, and bytes, for ``on_oom`` and batches to an update."""
    found = {}
    for on_oom in ("raise", "split"):
        for accumulation in (1, 4):
            trainer = trainer_of(gradient_accumulation=accumulation, on_oom=on_oom)
            ring = trainer.communicator
            before = ring.num_collectives, ring.num_bytes
            trainer.fit(rows(96), epochs=1, verbose=0)
            after = ring.num_collectives, ring.num_bytes
            found[f"{on_oom} {accumulation}"] = [b - a for a, b in zip(before, after, strict=True)]
    return found


@case
def split_resumed(folder):
    """Saved in the middle, and gone on with by ranks that have room."""
    data = rows(96)

    def make(room):
        return trainer_of(net(room_on_rank_1(room)), optim.AdamW(0.01), on_oom="split")

    whole = fitted(make(2), data, epochs=3)
    fitted(make(2), data, epochs=3, max_steps=10, checkpoint_dir=folder / "run")
    resumed = fitted(make(None), data, epochs=3, checkpoint_dir=folder / "run", resume=True)
    return {"whole": whole, "resumed": resumed}


@case
def shares(folder):
    """Limits of ranks that share a machine with 16 MB, and of ranks that do not."""
    found = {}
    own = "this rank's share of what its machine or container has"
    for hosts in (("one", "other"), ("one", "one")):
        socket.gethostname = lambda hosts=hosts: hosts[RANK]
        memory._left_on_linux = lambda: [16_000_000]
        gc.collect()
        mx.clear_cache()
        trainer = trainer_of(wide(), batch_size=4096)
        held = memory.active_bytes() + memory.cache_bytes()
        # A batch of which each rank's half needs more than half of the machine.
        found[hosts[1]] = {
            "held": held,
            "share": memory.limits().get(own),
            "caught": caught(trainer, rows(4096), epochs=1),
        }
    return found


# --- a lack of memory that ends the run -----------------------------------------------------------


def caught(trainer, data, **options):
    try:
        fitted(trainer, data, **options)
    except Exception as error:
        facts = {name: getattr(error, name, None) for name in ("rank", "type", "kind", "step")}
        return {"error": type(error).__name__, "text": str(error)} | facts


def full_on_last(step_name, number):
    """The ``number``-th call of a method of the training step fails on the last rank."""
    method, calls = getattr(TrainStep, step_name), []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError(FULL)
        return method(self, *args)

    setattr(TrainStep, step_name, failing)


def is_last(trainer):
    return trainer.rank == trainer.size - 1


@case
def full_at_dispatch(folder):
    trainer = trainer_of(net(), batch_size=12)
    trainer.model.room = 2 if is_last(trainer) else None
    return caught(trainer, rows(96), checkpoint_dir=folder / "run")


@case
def full_at_evaluation(folder):
    """Where gradients are evaluated, before anything is sent."""
    trainer = trainer_of(net())
    if is_last(trainer):
        full_on_last("_close_together", 3)
    return caught(trainer, rows(96), checkpoint_dir=folder / "run")


@case
def full_at_update(folder):
    """Where the update is evaluated, after everything was sent."""
    trainer = trainer_of(net())
    if is_last(trainer):
        full_on_last("wait", 6)
    return caught(trainer, rows(96), checkpoint_dir=folder / "run")


@case
def full_with_one_row(folder):
    """Not even one row fits, so splitting does not help."""
    trainer = trainer_of(net(), on_oom="split")
    trainer.model.room = 0 if is_last(trainer) else None
    return caught(trainer, rows(96))


@case
def full_foreseen(folder):
    model = wide()
    config = DeviceConfig(memory_limit=mx.get_active_memory() + 1_000_000)
    trainer = trainer_of(model, batch_size=4096, device_config=config)
    if not is_last(trainer):
        trainer.device_config = DeviceConfig()
    return caught(trainer, rows(4096))


@case
def full_uncaught(folder):
    trainer = trainer_of(net())
    trainer.model.room = 2 if is_last(trainer) else None
    trainer.fit(rows(96), verbose=0)


if __name__ == "__main__":
    main()
