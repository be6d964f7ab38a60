"""Save weights, or everything, while training."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.monitor import Monitor, watched
from mlx_fit.checkpoint.store import remove_checkpoint
from mlx_fit.checks import boolean, natural, number, path_of
from mlx_fit.errors import (
    CheckpointWriteError,
    ConfigurationError,
    NonFiniteLossError,
    UnknownMonitorError,
)

SUFFIX = ".safetensors"
COUNTS = ("epoch", "batch", "step")


class ModelCheckpoint(Callback):
    """Saves each epoch, every so many steps, or when a value is the best so far.

    Args:
        filepath: a ``.safetensors`` path, for the model's weights; or a folder, for a checkpoint
            of everything, as ``fit(resume=...)`` and ``Trainer.load`` read it. May hold
            ``{epoch}`` and ``{batch}`` (both 1-based), ``{step}``, and any key of the logs:
            ``"{epoch:02d}-{val_loss:.3f}.safetensors"``.
        monitor: key in the logs, looked at with ``save_best_only``.
        save_best_only: save only when the monitored value improves on the best so far, which
            persists over fits.
        save_weights_only: whether only weights are saved, which the path says already; None leaves
            it at that.
        mode: ``"min"``, ``"max"``, or ``"auto"``, the metric's own direction.
        save_freq: ``"epoch"`` (also: each evaluation inside epochs), or every so many steps,
            counted across epochs.
        initial_value_threshold: the first value must beat this one.
        keep: how many to keep; the oldest goes once the newest is safe. None keeps all.
        verbose: 1 prints a line per decision.

    Attributes:
        best: the best value so far, None before the first.
        last_path: the file or folder written last, None before the first.
    """

    def __init__(
        self,
        filepath: str | Path,
        monitor: str = "val_loss",
        save_best_only: bool = False,
        save_weights_only: bool | None = None,
        mode: str = "auto",
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
        keep: int | None = None,
        verbose: int = 0,
    ) -> None:
        owner = "ModelCheckpoint"
        self.filepath = str(path_of(f"{owner}: filepath", filepath))
        self.monitor = monitor
        self.best = initial_value_threshold
        if initial_value_threshold is not None:
            self.best = number(f"{owner}: initial_value_threshold", initial_value_threshold)
        self.last_path: Path | None = None
        self._verbose = verbose
        self._best_only = boolean(f"{owner}: save_best_only", save_best_only)
        self._monitor = Monitor(monitor, mode, owner)
        self._every = _checked_frequency(save_freq)
        self._keep = None if keep is None else natural(f"{owner}: keep", keep, 1)
        self._written: list[str] = []
        self._step_looked_at = -1
        self._batch = 0
        self._has_value = False
        self._keys_seen: list[str] = []  # where the monitored value was missing
        _check_path(self.filepath, save_weights_only)
        # What a checkpoint holds of the other callbacks must be of this step.
        self.runs_last = not self.filepath.endswith(SUFFIX)
        if self._every and save_best_only and monitor.startswith("val_"):
            raise ConfigurationError(
                f"ModelCheckpoint saves every {save_freq} steps, where {monitor!r} does not exist. "
                "Use save_freq='epoch': with fit(validation_freq='500 steps') it acts on each "
                "evaluation."
            )

    def on_train_begin(self, logs: Any) -> None:
        """The monitored value has to appear again; the best stays."""
        self._monitor.start()
        self._step_looked_at = self.trainer.step
        self._has_value = False

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Save if a step of ``save_freq`` has just ended."""
        self._batch = batch + 1
        if self._every:
            self._consider_step(logs)

    def _consider_step(self, logs: Mapping[str, Any]) -> None:
        step = self.trainer.step
        if step % (self._every or 1) or step == self._step_looked_at:
            return
        self._step_looked_at = step
        facts = {"epoch": self.trainer.epoch + 1, "batch": self._batch, "step": step}
        if not self._best_only:
            self._consider(None, facts, logs)
        elif self.monitor in logs:
            self._has_value = True
            self._consider(watched(logs, self.monitor, "ModelCheckpoint"), facts, logs)
        else:
            self._keys_seen = sorted(logs)

    def on_validation_end(self, logs: Any) -> None:
        """Save after an evaluation inside an epoch."""
        run = self.trainer
        if self._every or not run.info.validates_inside_epochs:
            return
        value = self._monitor.after_validation(run, logs) if self._best_only else None
        if value is not None or not self._best_only:
            facts = {"epoch": run.epoch + 1, "batch": self._batch, "step": run.step}
            self._consider(value, facts, logs)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Save after an epoch, or after a step that the end of the epoch closed."""
        if self._every:
            self._consider_step(logs)
            if self._keys_seen and not self._has_value:
                raise UnknownMonitorError(self.monitor, self._keys_seen, "ModelCheckpoint")
            return
        value = self._monitor.at_epoch_end(self.trainer, logs) if self._best_only else None
        if value is not None or not self._best_only:
            facts = {"epoch": epoch + 1, "batch": self._batch, "step": self.trainer.step}
            self._consider(value, facts, logs)

    def _consider(
        self, value: float | None, facts: dict[str, Any], logs: Mapping[str, Any]
    ) -> None:
        path = _formatted(self.filepath, facts, logs)
        prefix = f"Epoch {facts['epoch']}: "
        if self._best_only:
            if value is None or not self._monitor.improves(self.trainer, value, self.best):
                if self._verbose:
                    print(f"{prefix}{self.monitor} did not improve from {_short(self.best)}")
                return
            change = f"{self.monitor} improved from {_short(self.best)} to {_short(value)}, "
        else:
            change = ""
        if self._verbose:
            print(f"{prefix}{change}saving model to {path}")
        before = self.best, self.last_path, self._written
        # First: a checkpoint holds this, too.
        self.best = value if value is not None else self.best
        self.last_path = path
        self._written = [name for name in self._written if name != str(path)] + [str(path)]
        try:
            self._write(path)
        except NonFiniteLossError as error:
            self.best, self.last_path, self._written = before
            if not self.trainer.quiet_on_nonfinite:
                raise
            # TerminateOnNaN asked for a quiet end; the last good file stays.
            warnings.warn(str(error), stacklevel=2)
        except Exception:
            self.best, self.last_path, self._written = before
            raise
        while self._keep is not None and len(self._written) > self._keep:
            _remove(Path(self._written.pop(0)))

    def _write(self, path: Path) -> None:
        if self.runs_last:
            self.trainer.save(path)
        elif path.is_dir():
            raise CheckpointWriteError(
                f"{path} is a directory; the weights need a file name.", path=path
            )
        else:
            self.trainer.save_weights(path)

    def state_dict(self) -> dict[str, Any]:
        """The best value and the files written."""
        return {
            "best": self.best,
            "written": list(self._written),
            "last_path": None if self.last_path is None else str(self.last_path),
            "step_looked_at": self._step_looked_at,
            "has_value": self._has_value,
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on comparing with the best of the run so far."""
        self.best, self._written = state["best"], list(state["written"])
        self.last_path = None if state["last_path"] is None else Path(state["last_path"])
        self._step_looked_at, self._has_value = state["step_looked_at"], state["has_value"]
        self._monitor.load_state_dict(state["monitor"])


def _checked_frequency(save_freq: int | str) -> int | None:
    if save_freq == "epoch":
        return None
    try:
        return natural("save_freq", save_freq, 1)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"ModelCheckpoint(save_freq={save_freq!r}); expected 'epoch' or a positive number of "
            "steps."
        ) from error


def _check_path(filepath: str, save_weights_only: bool | None) -> None:
    if filepath == ".":
        raise ConfigurationError("ModelCheckpoint: filepath is empty; expected a path.")
    suffix = Path(re.sub(r"\{[^}]*\}", "0", filepath)).suffix
    if suffix != SUFFIX and re.fullmatch(r"\.[A-Za-z]\w*", suffix):
        raise ConfigurationError(
            f"ModelCheckpoint({filepath!r}) cannot tell what to write; expected a path that ends "
            "with .safetensors, for weights, or a folder without a suffix, for everything."
        )
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(filepath)]
    except ValueError as error:
        raise ConfigurationError(f"ModelCheckpoint({filepath!r}): {error}.") from error
    if "" in fields:
        raise ConfigurationError(
            f"ModelCheckpoint({filepath!r}): a field has no name; write {{epoch}}, {{step}} or a "
            "key of the logs."
        )
    try:  # with numbers of the kinds that will come
        filepath.format_map({name: 1 if name in COUNTS else 0.5 for name in fields if name})
    except (ValueError, LookupError, AttributeError) as error:
        raise ConfigurationError(
            f"ModelCheckpoint({filepath!r}): {error}. {{epoch}}, {{batch}} and {{step}} are whole "
            "numbers, values of the logs are floats: {epoch:02d}, {val_loss:.3f}."
        ) from error
    if save_weights_only is not None and save_weights_only != (suffix == SUFFIX):
        raise ConfigurationError(
            f"ModelCheckpoint({filepath!r}, save_weights_only={save_weights_only}): a .safetensors "
            "file holds weights only, a folder without a suffix everything. Change the path, or "
            "leave the argument out."
        )


def _formatted(template: str, facts: dict[str, Any], logs: Mapping[str, Any]) -> Path:
    """The path with its fields filled in; only those that it names are read from the logs."""
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    unknown = sorted(name for name in fields if name not in facts and name not in logs)
    if unknown:
        raise ConfigurationError(
            f"ModelCheckpoint's path {template!r} names {', '.join(unknown)}; available here: "
            f"{', '.join([*facts, *logs])}."
        )
    known = {name: facts[name] if name in facts else logs[name] for name in fields}
    return Path(template.format(**known))


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            remove_checkpoint(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # an old file too many is no reason to end a run
        warnings.warn(f"The old {path} could not be removed: {error}", stacklevel=2)


def _short(value: float | None) -> str:
    return "None" if value is None else f"{value:.5f}"
