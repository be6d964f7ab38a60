"""Samples of a model's outputs, to be looked at in TensorBoard while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.event_files import EventFile, purge
from mlx_fit.checks import natural, path_of
from mlx_fit.errors import ConfigurationError

FOLDER = "predictions"
MAX_NUMBERS = 8  # of an output, in its cell of the table


class Predictions(Callback):
    """Writes what the model makes of some rows to TensorBoard, as a table per epoch.

    For classes (outputs of shape ``(rows, classes)`` with integer targets, or with
    ``class_names``) a cell holds the likeliest class and its softmax probability; otherwise the
    output's first numbers. With :class:`EMA` or :class:`SWA` the averages predict.

    Args:
        data: ``(x, y)``, or ``x`` alone: arrays, whose first rows are used; ``x`` may be a dict.
            Weights, as in ``(x, y, weights)``, are not looked at.
        log_dir: the run's folder, that of :class:`TensorBoard`; files go to its folder
            ``predictions``.
        class_names: names of the classes.
        every: epochs from one table to the next.
        max_rows: rows of the table at most.

    Attributes:
        outputs: the newest outputs, NumPy.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> x, y = np.zeros((4, 2), np.float32), np.zeros(4, np.int32)
        >>> callback = Predictions((x, y), "runs/a", class_names=["cat", "dog"])
    """

    first_rank_only = True

    def __init__(
        self,
        data: Any,
        log_dir: str | Path,
        class_names: Sequence[str] | None = None,
        every: int = 1,
        max_rows: int = 16,
    ) -> None:
        natural("Predictions: max_rows", max_rows, 1)
        self._every = natural("Predictions: every", every, 1)
        x, y = (*data, None)[:2] if isinstance(data, tuple) and data else (data, None)
        try:
            self._x = _first(x, max_rows)
            num_rows = len(next(iter(self._x.values())) if isinstance(self._x, dict) else self._x)
            self._targets = None if y is None else np.array(y[:max_rows])
        except (TypeError, StopIteration) as error:
            raise ConfigurationError(
                f"Predictions: data={data!r:.80}; expected arrays: (x, y), or x alone."
            ) from error
        if not num_rows or (self._targets is not None and len(self._targets) != num_rows):
            raise ConfigurationError(
                f"Predictions: data has {num_rows} rows of inputs and "
                f"{0 if self._targets is None else len(self._targets)} of targets; expected (x, y) "
                "with as many of both, at least one, or x alone."
            )
        if isinstance(class_names, str):
            raise ConfigurationError(
                f"Predictions: class_names={class_names!r}; expected a list of names."
            )
        self._names = None if class_names is None else [str(name) for name in class_names]
        self._folder = path_of("Predictions: log_dir", log_dir) / FOLDER
        self._num_epochs = 0
        self._writer: EventFile | None = None
        self.outputs: Any = None

    def on_train_begin(self, logs: Any) -> None:
        """Drop what a run that goes on writes anew."""
        self._continue_from(self.trainer.info.initial_epoch)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Predict, and write the table."""
        from tensorboardX import summary

        self._num_epochs = epoch + 1
        if self._num_epochs % self._every:
            return
        averages = self.trainer.averages
        with nullcontext() if averages is None else averages.standing_in():
            self.outputs = self.trainer.predict_on_batch(self._x)
        if self._writer is None:
            self._writer = EventFile(self._folder)
        self._writer.add(summary.text("predictions", self.table()), epoch)

    def on_train_end(self, logs: Any) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, error: BaseException) -> None:
        """Close the file."""
        self._close()

    def table(self) -> str:
        """The newest outputs as a table in Markdown.

        Raises:
            ConfigurationError: nothing was predicted yet.
        """
        if self.outputs is None:
            raise ConfigurationError("Predictions.table(): nothing was predicted yet; fit first.")
        has_targets = self._targets is not None
        lines = ["| row | target | output |" if has_targets else "| row | output |"]
        lines.append("|---|---|---|" if has_targets else "|---|---|")
        outputs = self.outputs
        parts = outputs.items() if isinstance(outputs, dict) else [("", outputs)]
        cells = [
            [f"{name}: {cell}" if name else cell for cell in self._cells(np.asarray(part))]
            for name, part in parts
        ]
        for row, texts in enumerate(zip(*cells, strict=True)):
            target = f"{self._target(row)} | " if has_targets else ""
            lines.append(f"| {row} | {target}{'; '.join(texts)} |")
        return "\n".join(lines)

    def _cells(self, outputs: np.ndarray) -> list[str]:
        """A text for each row."""
        if not self._are_classes(outputs):
            return [_numbers(row) for row in outputs]
        shifted = np.exp(outputs - outputs.max(-1, keepdims=True))
        shares = shifted / shifted.sum(-1, keepdims=True)
        best = shares.argmax(-1)
        return [
            f"{self._name(label)} ({100 * share[label]:.1f} %)"
            for label, share in zip(best, shares, strict=True)
        ]

    def _are_classes(self, outputs: np.ndarray) -> bool:
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            return False
        targets = self._targets
        whole = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
        return whole or self._names is not None

    def _target(self, row: int) -> str:
        assert self._targets is not None
        target = self._targets[row]
        is_label = target.ndim == 0 and target.dtype.kind in "iu"
        return self._name(int(target)) if is_label else _numbers(target)

    def _name(self, label: int) -> str:
        known = self._names is not None and 0 <= label < len(self._names)
        return self._names[label] if known and self._names else str(label)

    def state_dict(self) -> dict[str, Any]:
        """How many epochs were written."""
        return {"num_epochs": self._num_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remove what was written after the checkpoint."""
        self._continue_from(state["num_epochs"])

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _continue_from(self, epoch: int) -> None:
        self._close()
        self._num_epochs = epoch
        if epoch:
            purge(self._folder, lambda tag, step: step < epoch)


def _first(x: Any, count: int) -> Any:
    if isinstance(x, dict):
        return {key: _first(value, count) for key, value in x.items()}
    return np.array(x[:count]) if isinstance(x, list) else x[:count]


def _numbers(row: np.ndarray) -> str:
    flat = np.asarray(row).reshape(-1)
    text = ", ".join(f"{value:.4g}" for value in flat[:MAX_NUMBERS].tolist())
    return f"{text}, ..." if flat.size > MAX_NUMBERS else text
