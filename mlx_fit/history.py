"""The history of a fit: its curves, and what was evaluated when."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from mlx_fit.checks import path_of
from mlx_fit.errors import ConfigurationError


class History:
    """What ``fit`` returns.

    Attributes:
        history: key -> a value per epoch (validation keys: per epoch that was validated).
        epoch: the epochs that ran, 0-based.
        params: ``{"verbose", "epochs", "steps"}``, as Keras has them.
        evaluations: every evaluation during the fit, ``{"step", "epoch", "val_loss", ...}``.
        stopped_by: why training ended early (``"SIGINT"``, a callback's name, ...), or None.
    """

    def __init__(self, params: dict[str, Any], direction: Callable[[str], bool | None]) -> None:
        self.history: dict[str, list[Any]] = {}
        self.epoch: list[int] = []
        self.params = params
        self.evaluations: list[dict[str, Any]] = []
        self.stopped_by: str | None = None
        self.catch_up: Callable[[], None] | None = None  # while a fit writes rows of steps late
        self._steps: list[dict[str, Any]] = []
        self._direction = direction
        self._rows: list[dict[str, Any]] = []

    def append(self, epoch: int, logs: dict[str, Any]) -> None:
        """Add the row of an epoch."""
        self.epoch.append(epoch)
        self._rows.append({"epoch": epoch, **logs})
        for key, value in logs.items():
            self.history.setdefault(key, []).append(value)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Rows every ``log_every`` steps, ``{"step", "epoch", "loss", ...}``.

        Each is the mean over the steps since the row before. Inside a fit this waits for the step
        of the newest row.
        """
        if self.catch_up is not None:
            self.catch_up()
        return self._steps

    def state_dict(self) -> dict[str, Any]:
        """The curves as plain values, for a checkpoint."""
        return {
            "rows": _columns(self._rows),
            "evaluations": _columns(self.evaluations),
            "steps": _columns(self.steps),
            "stopped_by": self.stopped_by,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from curves that :meth:`state_dict` gave."""
        self.history, self.epoch, self._rows = {}, [], []
        for row in _rows(state["rows"]):
            self.append(row.pop("epoch"), row)
        self.evaluations, self._steps = _rows(state["evaluations"]), _rows(state["steps"])
        self.stopped_by = state["stopped_by"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per epoch, ``{"epoch", "loss", ...}``, with the keys that the epoch has."""
        return [dict(row) for row in self._rows]

    @property
    def last(self) -> dict[str, Any]:
        """The newest epoch's values; empty before the first has ended."""
        return {k: v for k, v in self._rows[-1].items() if k != "epoch"} if self._rows else {}

    def best(self, key: str, mode: str = "auto") -> tuple[int, float]:
        """The epoch (0-based) with the best value of ``key``, and the value.

        Args:
            key: for example ``"val_loss"``.
            mode: ``"min"``, ``"max"``, or ``"auto"``, which asks the metric.

        Raises:
            ConfigurationError: the key does not exist or holds no numbers, or nobody declared its
                direction.
        """
        if key not in self.history:
            raise ConfigurationError(
                f"The history has no {key!r}; it has {', '.join(self.history) or 'nothing'}."
            )
        if not all(map(_is_number, self.history[key])):
            raise ConfigurationError(f"{key!r} holds no numbers, of which one could be best.")
        if mode not in ("auto", "min", "max"):
            raise ConfigurationError(f"mode={mode!r}; expected 'auto', 'min' or 'max'.")
        higher = self._direction(key) if mode == "auto" else mode == "max"
        if higher is None:
            raise ConfigurationError(f"Nobody declared the direction of {key!r}; give mode=.")
        sign = -1.0 if higher else 1.0
        rows = [(row["epoch"], row[key]) for row in self._rows if key in row]

        def badness(row: tuple[int, float]) -> float:
            return math.inf if math.isnan(row[1]) else sign * row[1]

        return min(rows, key=badness)

    def table(self) -> str:
        """The curves' last and best values as text, a line per key; ``print(history)`` shows it.

        The best is left empty where nobody declared a direction. What is no number (a matrix, a
        dict of norms) is left out. Epochs are counted from 0, as everywhere in the history.

        Example:
            >>> history = History({}, lambda key: False)
            >>> history.append(0, {"loss": 0.5, "val_loss": 0.75})
            >>> history.append(1, {"loss": 0.25, "val_loss": 1.0})
            >>> print(history.table())
            2 epochs  last  best  epoch
            loss      0.25  0.25      1
            val_loss     1  0.75      0
        """
        number = len(self.epoch)
        lines = [(f"{number} {'epoch' if number == 1 else 'epochs'}", "last", "best", "epoch")]
        for key, values in self.history.items():
            if not all(_is_number(value) for value in values):
                continue
            best, epoch = "", ""
            if self._direction(key) is not None:
                found = self.best(key)
                best, epoch = f"{found[1]:.5g}", str(found[0])
            lines.append((key, f"{values[-1]:.5g}", best, epoch))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        if self.stopped_by:
            rows.append(f"stopped by {self.stopped_by}")
        return "\n".join(rows)

    def to_csv(self, path: str | Path) -> None:
        """Write one line per epoch; a value that an epoch does not have is empty."""
        import csv  # here: importing mlx_fit stays cheap

        path = path_of("path", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", *self.history], restval="")
            writer.writeheader()
            writer.writerows(self._rows)

    def plot(self, keys: list[str] | None = None) -> Any:
        """Curves by epoch, training and validation overlaid, as a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ConfigurationError: there is nothing to plot.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("History.plot needs matplotlib: pip install matplotlib.") from error
        names = keys or [
            key
            for key, values in self.history.items()
            if not key.startswith("val_") and all(map(_is_number, values))
        ]
        if not names:
            raise ConfigurationError("The history has no numbers to plot: no epoch has ended.")
        figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            for key in (name, f"val_{name}"):
                points = [(row["epoch"] + 1, row[key]) for row in self._rows if key in row]
                if points:
                    axis.plot(*zip(*points, strict=True), label=key)
            axis.set_xlabel("epoch")
            axis.legend()
        figure.tight_layout()
        return figure

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        last = {key: values[-1] for key, values in self.history.items()}
        return f"History({len(self.epoch)} epochs, last {last})"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _columns(rows: list[dict[str, Any]]) -> Any:
    """Rows as columns, which are shorter to write, where all have the same keys."""
    if rows and all(row.keys() == rows[0].keys() for row in rows):
        return {key: [row[key] for row in rows] for key in rows[0]}
    return [dict(row) for row in rows]


def _rows(columns: Any) -> list[dict[str, Any]]:
    if isinstance(columns, list):
        return [dict(row) for row in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
