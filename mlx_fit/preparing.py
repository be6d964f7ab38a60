"""What a fit is given, checked and brought into the form that it is run in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_fit.arguments import split_validation, validation_sets
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.checkpoint.store import CheckpointStore
from mlx_fit.communicator import check_same, first_alone
from mlx_fit.data.class_weights import ClassWeights
from mlx_fit.data.feed import Feed, Replay
from mlx_fit.data.sources import as_source
from mlx_fit.data.split import EndlessSource, JoinedSource, split_over
from mlx_fit.errors import ConfigurationError
from mlx_fit.objective import Supervised
from mlx_fit.options import StepOptions
from mlx_fit.protocols import Communicator, Run, RunInfo
from mlx_fit.resuming import check_seed, open_store
from mlx_fit.saving import Saver
from mlx_fit.state import TrainState
from mlx_fit.timing import Schedule


@dataclass
class Order:
    """What decides the order of data: the trainer's seed, the one in use, and passes so far."""

    given_seed: int | None
    seed: int
    num_passes: int


@dataclass
class Prepared:
    """What a fit is to do, with its data and checkpoints.

    Attributes:
        schedule: when to do what.
        feed: training batches.
        validation: name -> batches; the name is ``""`` for a single set.
        weigh: adds class weights, or None.
        policy: when to save.
        store: where to, or None.
        found: the checkpoint to go on from, or None.
        arguments: what the fit was asked for, as plain values.
    """

    schedule: Schedule
    feed: Feed
    validation: dict[str, Replay]
    weigh: ClassWeights | None
    policy: CheckpointPolicy
    store: CheckpointStore | None
    found: tuple[Path, TrainState] | None
    arguments: dict[str, Any]

    def saver(self, run: Run) -> Saver | None:
        """What writes checkpoints, if there is a folder for them."""
        if self.store is None:
            return None
        return Saver(self.store, self.policy, run, None if self.found is None else self.found[0])


def prepare_fit(
    train: Any,
    val: Any,
    schedule: Schedule,
    order: Order,
    objective: Any,
    ranks: Communicator,
    *,
    batch_size: int,
    validation_split: float,
    class_weight: Mapping[Any, float] | None,
    shuffle: bool,
    checkpoint_dir: Any,
    checkpoint_every: Any,
    resume: Any,
) -> Prepared:
    """Check what ``Trainer.fit`` was given, find the checkpoint to resume, and open the data.

    Raises:
        ConfigurationError, DataError, ResumeError, CheckpointError: as ``Trainer.fit``.
    """
    policy = CheckpointPolicy.get(checkpoint_every)
    weigh = _class_weights(class_weight, objective)
    train, val = split_validation(train, val, validation_split)
    store, found = first_alone(ranks, partial(open_store, checkpoint_dir, checkpoint_every, resume))
    check_same(ranks, {"The checkpoint to resume": None if found is None else str(found[0])})
    if found is not None:
        saved = found[1].trainer["order_seed"]
        check_seed(order.given_seed, saved)
        order = replace(order, seed=saved)
    given: dict[str, Any] = {"batch_size": batch_size, "shuffle": shuffle, "seed": order.seed}
    source = as_source(train, may_be_empty=ranks.size > 1, **given)
    joined = JoinedSource if schedule.steps_per_epoch is None else EndlessSource
    source = split_over(source, ranks, joined)
    start = max(order.num_passes, schedule.initial_epoch)
    arguments = {
        "batch_size": source.batch_size,
        "max_steps": schedule.max_steps,
        "epochs": schedule.epochs,
        "initial_epoch": schedule.initial_epoch,
        "steps_per_epoch": schedule.steps_per_epoch,
        "validation_freq": schedule.validation_freq,
        "validation_steps": schedule.validation_steps,
        "validation_split": validation_split,
        "class_weight": None if class_weight is None else dict(class_weight),
        "shuffle": shuffle,
        "log_every": schedule.log_every,
    }
    if store is not None:
        arguments["checkpoint_every"] = policy.every
    agreed = arguments | {"batch_size": batch_size, "checkpoint_dir": store is not None}
    agreed["val"] = list(val) if isinstance(val, dict) else "nothing" if val is None else "one set"
    check_same(ranks, {f"fit's {name}": value for name, value in agreed.items()})
    return Prepared(
        schedule,
        Feed(source, schedule.steps_per_epoch, start),
        validation_sets(val, schedule, batch_size, ranks),
        weigh,
        policy,
        store,
        found,
        arguments,
    )


def _class_weights(weights: Mapping[Any, float] | None, objective: Any) -> ClassWeights | None:
    if weights is None:
        return None
    if not isinstance(objective, Supervised):
        raise ConfigurationError(
            "class_weight needs a loss=: what an objective does with weights is its own matter. "
            "Weigh the classes in the objective."
        )
    return ClassWeights(weights)


def run_info(
    prepared: Prepared, options: StepOptions, verbose: int, settings: dict[str, Any]
) -> RunInfo:
    """What callbacks are told of a fit.

    Args:
        prepared: the fit.
        options: how a batch becomes an update.
        verbose: 0, 1 or 2.
        settings: the trainer's arguments, as plain values.
    """
    schedule, source = prepared.schedule, prepared.feed.source
    return RunInfo(
        "fit",
        schedule.epochs,
        schedule.initial_epoch,
        schedule.steps_per_epoch or source.num_batches,
        tuple(prepared.validation),
        schedule.validates_every is not None,
        source.batch_size or 0,
        (source.batch_size or 0) * options.gradient_accumulation,
        verbose,
        settings | prepared.arguments,
        options.compile,
    )


def trainer_arguments(
    options: StepOptions, loss: Any, metrics: Any, objective: Any
) -> dict[str, Any]:
    """A trainer's arguments as plain values, for records and to compare at a resume."""
    listed = metrics if isinstance(metrics, (list, tuple, dict)) else [metrics]
    return {
        "loss": _name(loss),
        "metrics": {k: _name(v) for k, v in listed.items()}
        if isinstance(listed, dict)
        else [_name(metric) for metric in listed],
        "objective": _name(objective),
        "gradient_accumulation": options.gradient_accumulation,
        "clip_norm": options.clip_norm,
        "clip_value": options.clip_value,
        "precision": options.precision.name,
        "nonfinite": options.nonfinite,
        "on_oom": options.on_oom,
    }


def _name(value: Any) -> Any:
    """What a user would call a loss or a metric."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_name(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _name(item) for key, item in value.items()}
    return getattr(value, "__name__", type(value).__name__)
