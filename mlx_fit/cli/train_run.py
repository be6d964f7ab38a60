"""A run of ``mlx-fit train``: everything that its file names, made and put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit import callbacks, distributed, losses, metrics, schedules
from mlx_fit.arguments import evaluation_source
from mlx_fit.batch import describe
from mlx_fit.causal_lm import CausalLM
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.cli.objects import USE, Names, own_code
from mlx_fit.cli.results import print_history
from mlx_fit.cli.settings import UsageError, checking_usage
from mlx_fit.cli.train_config import OF_FIT, OF_RANKS, OF_TRAINER
from mlx_fit.cli.train_data import make_data
from mlx_fit.data.data_module import fit_loaders, is_data_module
from mlx_fit.distributed.ring import rank_and_size
from mlx_fit.distributed.sync import SyncPolicy
from mlx_fit.distributed.trainer import DistributedTrainer
from mlx_fit.dpo import DPO
from mlx_fit.errors import ConfigurationError
from mlx_fit.history import History
from mlx_fit.objective import Supervised
from mlx_fit.orpo import ORPO
from mlx_fit.runtime.device import DeviceConfig
from mlx_fit.trainer import Trainer

MLX_SCHEDULES = (
    *("cosine_decay", "exponential_decay", "join_schedules", "linear_schedule", "step_decay"),
)
NOT_MADE = ("get", "Loss", "Metric", "Mean", "Schedule", "Strategy", "DistributedTrainer")
OBJECTIVES = {made.__name__: made for made in (CausalLM, DPO, ORPO, Supervised)}
MADE_OF_TABLES: Mapping[str, Callable[..., Any]] = {
    "checkpoint_every": CheckpointPolicy,
    "device_config": DeviceConfig,
    "sync": SyncPolicy,
}


class TrainRun:
    """A run of ``mlx-fit train``.

    With more than one rank, as under ``mlx-fit launch``, it is that of a
    :class:`~mlx_fit.DistributedTrainer`.

    Args:
        config: from :func:`~mlx_fit.cli.train_config.read_config`.
        path: of its file.

    Raises:
        UsageError: something cannot be made of what the file says.
    """

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self._folder, self._title = path.absolute().parent, path.stem
        given = dict(config.get("fit", {}))
        with checking_usage():
            given |= {
                key: self._names("an argument", {key: make}).call(
                    make, {USE: key, **given[key]}, f"fit.{key}"
                )
                for key, make in MADE_OF_TABLES.items()
                if isinstance(given.get(key), dict)
            }
            self._data = make_data(config["data"], self._folder)
            self._trainer = self._make_trainer(config, given)
            self._callbacks = self._make_callbacks(config.get("callbacks", {}))
        self._options = {key: value for key, value in given.items() if key in OF_FIT}

    # --- making -----------------------------------------------------------------------------------

    def _names(self, kind: str, *found: Mapping[str, Any]) -> Names:
        known = {name: value for names in found for name, value in names.items()}
        return Names(kind, known, self._folder)

    def _make_trainer(self, config: Mapping[str, Any], given: dict[str, Any]) -> Trainer:
        names = self._names("a model", _members(nn, dir(nn), nn.Module))
        model = names.make_a(nn.Module, config["model"], "model", given.get("seed"))
        optimizer = self._make_optimizer(config["optimizer"])
        parts: dict[str, Any] = {}
        for key, kind, known in (
            ("loss", "a loss", _members(losses, losses.__all__)),
            ("metrics", "a metric", _members(metrics, metrics.__all__)),
            ("objective", "an objective", OBJECTIVES),
        ):
            if key in config:
                parts[key] = self._names(kind, known).make(config[key], key)
        options = {key: value for key, value in given.items() if key in OF_TRAINER}
        if rank_and_size()[1] == 1 and not options.keys() & {*OF_RANKS}:
            return Trainer(model, optimizer, **parts, **options)
        if isinstance(options.get("strategy"), dict):
            names = self._names("a strategy", _members(distributed, distributed.__all__))
            options["strategy"] = names.make(options["strategy"], "fit.strategy")
        return DistributedTrainer(model, optimizer, **parts, **options)

    def _make_optimizer(self, given: Any) -> Any:
        rates = _members(schedules, schedules.__all__) | _members(optim, MLX_SCHEDULES)
        names = self._names("an optimizer", _members(optim, dir(optim), optim.Optimizer), rates)
        return names.make_a(optim.Optimizer, given, "optimizer")

    def _make_callbacks(self, given: Any) -> list[callbacks.Callback]:
        """Those of a table by name, or of a list; False leaves one out."""
        kind = callbacks.Callback
        names = self._names("a callback", _members(callbacks, callbacks.__all__, kind))
        found = []
        for key, value in given.items() if isinstance(given, Mapping) else enumerate(given):
            table = {} if value is True else value
            if isinstance(table, Mapping):
                table = table if USE in table else {USE: key, **table}
            elif value is not False and isinstance(given, Mapping):
                raise UsageError(f"callbacks.{key} is {value!r}; expected a table of arguments.")
            if value is not False:
                found.append(names.make_a(kind, table, f"callbacks.{key}"))
        return found

    # --- running ----------------------------------------------------------------------------------

    def show(self) -> None:
        """Print the layers, what memory a step takes, and the shapes of a batch."""
        trainer, train = self._trainer, self._data["train"]
        with own_code():
            if is_data_module(train):
                train, _ = fit_loaders(train)
            source = evaluation_source(train, trainer.batch_size, "data.train")
            batch = next(iter(source.batches(0)))
            trainer.summary()
            print(f"\nA batch: {describe(batch)}\n")
            print(trainer.plan(batch))

    def train(self) -> History:
        """Fit, and say what came of it; the test part is evaluated with the weights of the end."""
        trainer, start = self._trainer, time.perf_counter()
        try:
            with own_code():
                history = trainer.fit(
                    self._data["train"],
                    self._data.get("validation"),
                    callbacks=self._callbacks,
                    **self._options,
                )
        except ConfigurationError as error:
            if trainer.step:
                raise
            raise UsageError(str(error)) from error  # before anything was trained
        seconds = time.perf_counter() - start
        tested = {}
        if "test" in self._data and history.stopped_by != "SIGINT":
            with own_code():
                tested = trainer.evaluate(
                    self._data["test"], verbose=self._options.get("verbose", "auto")
                )
        if rank_and_size()[0] == 0:
            print_history(self._title, history, trainer.step, seconds, tested, self._written())
        return history

    def _written(self) -> dict[str, Path]:
        """Where files went, by what they are."""
        found = {}
        if "checkpoint_dir" in self._options:
            found["checkpoints"] = Path(self._options["checkpoint_dir"])
        for callback in self._callbacks:
            if isinstance(callback, callbacks.ModelCheckpoint) and callback.last_path:
                found["best weights"] = callback.last_path
            elif isinstance(callback, (callbacks.CSVLogger, callbacks.JSONLogger)):
                found["curves"] = callback.path
            elif isinstance(callback, callbacks.TensorBoard):
                found["TensorBoard files"] = callback.log_dir
        return found


def _members(home: Any, names: Iterable[str], kind: type = object) -> dict[str, Any]:
    """Classes of a kind, or with ``object`` classes and functions, by name."""
    found = {name: getattr(home, name) for name in names if not name.startswith("_")}
    if kind is object:
        return {k: v for k, v in found.items() if callable(v) and k not in NOT_MADE}
    return {
        k: v
        for k, v in found.items()
        if isinstance(v, type) and issubclass(v, kind) and v is not kind
    }
