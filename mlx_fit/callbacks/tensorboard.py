"""Curves for TensorBoard, written with tensorboardX."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fit.callbacks.base import Callback, numbers
from mlx_fit.errors import ConfigurationError
from mlx_fit.runtime.memory import peak_bytes


class TensorBoard(Callback):
    """Writes scalars to ``log_dir/train`` and ``log_dir/validation``, so that curves overlay.

    Tags are Keras's: ``epoch_loss`` and the other values by epoch (0-based),
    ``epoch_learning_rate``, ``evaluation_loss_vs_iterations`` by step, and with a batch frequency
    ``batch_loss`` by batches since the fit began. ``perf/step_time_ms``,
    ``perf/examples_per_second`` (where batches are made here) and ``perf/peak_memory_mib`` are by
    epoch.

    Args:
        log_dir: the run's folder. Several validation sets go to ``validation_<set>``.
        update_freq: ``"epoch"``; or ``"batch"`` or every so many batches, which also writes the
            running means after those batches. Only there values are read from the device.
    """

    def __init__(self, log_dir: str | Path = "runs", *, update_freq: int | str = "epoch") -> None:
        self.log_dir = Path(log_dir)
        self._every = _batches_between(update_freq)
        self._writers: dict[str, Any] = {}
        self._num_batches = 0
        self._start = 0.0
        self._first_step = 0
        if self._every:
            # Only overridden hooks are called: without a batch frequency a batch costs nothing.
            self.on_train_batch_end = self._write_batch  # type: ignore[method-assign]

    def on_train_begin(self, logs: Any) -> None:
        """Open the file, and count batches from the start of this fit."""
        self._close()
        self._num_batches = 0
        self._writer("train")  # a folder that cannot be written shows before training, not after

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._first_step = self.trainer.step

    def _write_batch(self, batch: int, logs: Any) -> None:
        self._num_batches += 1
        if self._num_batches % self._every == 0:
            values = {f"batch_{key}": value for key, value in logs.items()}
            self._write("train", values, self._num_batches)

    def on_validation_end(self, logs: Any) -> None:
        """Write an evaluation by its step."""
        for name, values in self._by_set(logs).items():
            tags = {f"evaluation_{key}_vs_iterations": value for key, value in values.items()}
            self._write(name, tags, self.trainer.step)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Write the epoch's values."""
        trained = {f"epoch_{k}": v for k, v in logs.items() if not k.startswith("val_")}
        self._write("train", trained | self._speed(), epoch)
        for name, values in self._by_set(logs).items():
            self._write(name, {f"epoch_{key}": value for key, value in values.items()}, epoch)
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: Any) -> None:
        """Close the files."""
        self._close()

    def on_exception(self, error: BaseException) -> None:
        """Close the files: what was written so far can be looked at."""
        self._close()

    def _speed(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        num_steps = max(self.trainer.step - self._first_step, 1)
        speed = {
            "perf/step_time_ms": 1e3 * seconds / num_steps,
            "perf/peak_memory_mib": peak_bytes() / 2**20,
        }
        if num_rows := self.trainer.info.rows_per_step:
            speed["perf/examples_per_second"] = num_steps * num_rows / seconds
        return speed

    def _by_set(self, logs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Validation values by the folder they go to, without their prefix."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.trainer.info.validation_sets:
            prefix = f"val_{name}_" if name else "val_"
            values = {k.removeprefix(prefix): v for k, v in logs.items() if k.startswith(prefix)}
            found[f"validation_{name}" if name else "validation"] = values
        return found

    def _write(self, folder: str, values: Mapping[str, Any], step: int) -> None:
        for tag, value in numbers(values).items():
            self._writer(folder).add_scalar(tag, value, step)

    def _writer(self, folder: str) -> Any:
        if folder not in self._writers:
            from tensorboardX import SummaryWriter

            # tensorboardX names files by the second: two writers of one second would collide.
            suffix = f".{os.urandom(4).hex()}"
            path = str(self.log_dir / folder)
            self._writers[folder] = SummaryWriter(path, filename_suffix=suffix)
        return self._writers[folder]

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def _batches_between(update_freq: int | str) -> int:
    """Batches from one written batch to the next; 0 for none."""
    if update_freq == "epoch":
        return 0
    if update_freq == "batch":
        return 1
    if isinstance(update_freq, int) and not isinstance(update_freq, bool) and update_freq > 0:
        return update_freq
    raise ConfigurationError(
        f"TensorBoard(update_freq={update_freq!r}); expected 'epoch', 'batch' or a positive number "
        "of batches."
    )
