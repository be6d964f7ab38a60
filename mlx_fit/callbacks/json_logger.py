"""One JSON object per line: epochs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_fit.callbacks.as_json import as_json, dumps
from mlx_fit.callbacks.log_file import LogFile
from mlx_fit.checks import boolean, file_of
from mlx_fit.errors import ConfigurationError


class JSONLogger(LogFile):
    """Writes a line of JSON for each epoch and each evaluation of a fit, as it ends.

    ``{"event": "epoch", "epoch": 0, "step": 40, "loss": 0.5, ...}`` and
    ``{"event": "evaluation", "epoch": 0, "step": 40, "val_loss": 0.6, ...}``, the epoch 0-based.
    Matrices are nested lists, norms by layer an object; NaN and infinity, which JSON does not have,
    are null. A run that is resumed from a checkpoint has every row once, with or without
    ``append``: the rows up to the checkpoint are in it.

    Args:
        path: the file; missing parent folders are made.
        append: keep what the file holds. A fit that starts at ``initial_epoch`` replaces the rows
            of that epoch and later.

    Raises:
        ConfigurationError: with ``append``, when ``fit`` starts: the file holds something else.

    Example:
        >>> callback = JSONLogger("runs/log.jsonl")
    """

    def __init__(self, path: str | Path, append: bool = False) -> None:
        super().__init__(file_of("JSONLogger: path", path))
        self._append = boolean("JSONLogger: append", append)
        self._rows: list[dict[str, Any]] = []

    def on_train_begin(self, logs: Any) -> None:
        """Start the file, or take over what it holds."""
        self._rows = []
        if self._append and self.path.exists():
            self._take_over(self.trainer.info.initial_epoch)
        self._rewrite()

    def on_validation_end(self, logs: Any) -> None:
        """Write an evaluation."""
        self._write("evaluation", self.trainer.epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Write an epoch."""
        self._write("epoch", epoch, logs)

    def _write(self, event: str, epoch: int, logs: Any) -> None:
        head = {"event": event, "epoch": epoch, "step": self.trainer.step}
        row = head | {k: v for k, v in as_json(logs).items() if k not in head}
        self._rows.append(row)
        self._add(lambda file: file.write(dumps(row) + "\n"))

    def _take_over(self, first_epoch: int) -> None:
        import json

        lines = self.path.read_text(encoding="utf-8").split("\n")
        rows = []
        for number, line in enumerate(lines[:-1], 1):  # the last is empty, or half a line
            try:
                rows.append(json.loads(line))
                is_row = isinstance(rows[-1]["epoch"], int)
            except (ValueError, TypeError, KeyError):
                is_row = False
            if not is_row:
                raise ConfigurationError(
                    f"JSONLogger(append=True): line {number} of {self.path} is no row of this "
                    "logger. Give another file, or append=False."
                )
        self._rows = [row for row in rows if not first_epoch or row["epoch"] < first_epoch]

    def _write_all(self, file: Any) -> None:
        file.writelines(dumps(row) + "\n" for row in self._rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write the file as it was; what came after the checkpoint is gone."""
        self._rows = list(state["rows"])
        self._rewrite()
