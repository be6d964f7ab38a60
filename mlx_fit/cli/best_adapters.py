"""The adapters of the best evaluation, kept in a folder while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fit import finetune
from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.monitor import Monitor

MONITOR = "val_loss"


class BestAdapters(Callback):
    """Writes the adapters whenever the validation loss is the lowest so far.

    Without validation data those of each epoch's end replace the ones before. Files are written
    whole or not at all, so that the folder is good whenever the process dies.

    Args:
        directory: for the files.
        format: their layout, ``"mlx-lm"`` or ``"peft"``.

    Attributes:
        best: the lowest validation loss, None before the first.
        best_step: the updates that had been made then.
    """

    first_rank_only = True

    def __init__(self, directory: Path, format: str) -> None:
        self.directory = directory
        self.best: float | None = None
        self.best_step: int | None = None
        self._format = format
        self._monitor = Monitor(MONITOR, "min", "BestAdapters")

    def on_train_begin(self, logs: Any) -> None:
        """The value has to appear in this fit; the best stays."""
        self._monitor.start()

    def on_validation_end(self, logs: Any) -> None:
        """Judge an evaluation inside an epoch."""
        self._judge(self._monitor.after_validation(self.trainer, logs))

    def on_train_end(self, logs: Any) -> None:
        """Without validation data the last ones are kept."""
        if not self.trainer.info.has_validation:
            self._save()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Without validation data these are the newest."""
        if not self.trainer.info.has_validation:
            self._save()

    def consider(self, logs: Mapping[str, float]) -> None:
        """Judge an evaluation that was made after the fit."""
        self._judge(logs.get("loss"))

    def _judge(self, value: float | None) -> None:
        if value is not None and self._monitor.improves(self.trainer, value, self.best):
            self.best = value
            self._save()

    def _save(self) -> None:
        self.best_step = self.trainer.step
        finetune.save_adapters(self.trainer.model, self.directory, self._format)

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        state = {"best": self.best, "best_step": self.best_step}
        return {**state, "monitor": self._monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on comparing with the best of the run so far."""
        self.best, self.best_step = state["best"], state["best_step"]
        self._monitor.load_state_dict(state["monitor"])
