"""One line per epoch in a CSV file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fit.callbacks.base import numbers
from mlx_fit.callbacks.device_monitor import DEVICE_KEYS
from mlx_fit.callbacks.log_file import LogFile
from mlx_fit.checks import boolean, file_of
from mlx_fit.errors import ConfigurationError

NOT_VALIDATED = ("learning_rate", "grad_norm", "skipped_updates", *DEVICE_KEYS)


class CSVLogger(LogFile):
    """Writes epoch (0-based), training and validation values to a CSV file as epochs end.

    Validation columns exist from the first row on if there is validation data, and are empty for
    epochs without validation. A run that is resumed from a checkpoint has every epoch once, with or
    without ``append``: the rows up to the checkpoint are in it. A row that cannot be written, on a
    full disk perhaps, is a warning, and is written with the next one that can be.

    Args:
        filename: the file; missing parent folders are made.
        separator: between values.
        append: keep what the file holds. A fit that starts at ``initial_epoch`` replaces the rows
            of that epoch and later.
    """

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False) -> None:
        if not isinstance(separator, str) or len(separator) != 1 or separator in '\r\n"':
            raise ConfigurationError(
                f"CSVLogger(separator={separator!r}); expected one character, such as ',' or ';'."
            )
        super().__init__(file_of("CSVLogger: filename", filename))
        self._separator = separator
        self._append = boolean("CSVLogger: append", append)
        self._columns: list[str] = []
        self._rows: list[Mapping[str, Any]] = []

    def on_train_begin(self, logs: Any) -> None:
        """Start the file, or take over what it holds."""
        self._columns, self._rows = [], []
        if self._append and self.path.exists():
            self._take_over(self.trainer.info.initial_epoch)
        self._rewrite()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Add the epoch's row."""
        row = {"epoch": epoch, **numbers(logs)}
        self._rows.append(row)
        expected = self._columns_for(row)
        new = [name for name in expected if name not in self._columns]
        self._columns += new
        self._add(None if new else lambda file: self._writer(file).writerow(row))

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"columns": list(self._columns), "rows": [dict(row) for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write the file as it was; what came after the checkpoint is gone."""
        self._columns = list(state["columns"])
        self._rows = [dict(row) for row in state["rows"]]
        self._rewrite()

    def _take_over(self, first_epoch: int) -> None:
        """Read the rows that stay: a run that goes on writes its epochs anew, none stands twice."""
        import csv

        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter=self._separator)
            rows, self._columns = list(reader), list(reader.fieldnames or [])
        if self._columns and (
            "epoch" not in self._columns or not all((r["epoch"] or "").isdigit() for r in rows)
        ):
            raise ConfigurationError(
                f"CSVLogger(append=True): {self.path} has no column of epochs (its columns are "
                f"{', '.join(self._columns)}). Give another file, its separator, or append=False."
            )
        self._rows = [row for row in rows if not first_epoch or int(row["epoch"]) < first_epoch]

    def _columns_for(self, row: Mapping[str, Any]) -> list[str]:
        """The row's own columns, and those that a validation will fill later."""
        trained = [k for k in row if not k.startswith("val_") and k != "epoch"]
        derived = [
            f"val_{name}_{key}" if name else f"val_{key}"
            for name in self.trainer.info.validation_sets
            for key in trained
            if key not in NOT_VALIDATED
        ]
        return list(dict.fromkeys(["epoch", *trained, *derived, *row]))

    def _write_all(self, file: Any) -> None:
        writer = self._writer(file)
        if self._columns:
            writer.writeheader()
            writer.writerows(self._rows)

    def _writer(self, file: Any) -> Any:
        import csv  # here: importing mlx_fit stays cheap

        return csv.DictWriter(file, self._columns, restval="", delimiter=self._separator)
