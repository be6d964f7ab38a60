"""One line per epoch in a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fit.callbacks.base import Callback

NOT_VALIDATED = ("learning_rate", "grad_norm", "skipped_updates")


class CSVLogger(Callback):
    """Writes epoch (0-based), training and validation values to a CSV file as epochs end.

    Validation columns exist from the first row on if there is validation data, and are empty for
    epochs without validation.

    Args:
        filename: the file; missing parent folders are made.
        separator: between values.
        append: keep what the file holds. A fit that starts at ``initial_epoch`` replaces the rows
            of that epoch and later.
    """

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False) -> None:
        self.path = Path(filename)
        self._separator = separator
        self._append = append
        self._columns: list[str] = []
        self._rows: list[Mapping[str, Any]] = []

    def on_train_begin(self, logs: Any) -> None:
        """Start the file, or take over what it holds."""
        self._columns, self._rows = [], []
        if self._append and self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file, delimiter=self._separator)
                rows, first = list(reader), self.trainer.info.initial_epoch
                self._columns = list(reader.fieldnames or [])
            # A run that goes on writes its epochs anew: no row may stand twice.
            self._rows = [row for row in rows if not first or int(row["epoch"]) < first]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Add the epoch's row."""
        row = {"epoch": epoch, **{k: v for k, v in logs.items() if isinstance(v, (int, float))}}
        self._rows.append(row)
        expected = self._columns_for(row)
        if new := [name for name in expected if name not in self._columns]:
            self._columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                self._writer(file).writerow(row)

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

    def _rewrite(self) -> None:
        with self.path.open("w", newline="") as file:
            writer = self._writer(file)
            if self._columns:
                writer.writeheader()
                writer.writerows(self._rows)

    def _writer(self, file: Any) -> Any:
        return csv.DictWriter(file, self._columns, restval="", delimiter=self._separator)
