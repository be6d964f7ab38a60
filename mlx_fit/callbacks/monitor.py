"""One watched value: where it appears, which direction is better, whether it improved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_fit.checks import number
from mlx_fit.errors import ConfigurationError, UnknownMonitorError
from mlx_fit.protocols import Run


class Monitor:
    """The value that a callback watches.

    With validation at epoch ends (or none) a value is judged at each epoch's end. With validation
    inside epochs (``validation_freq="500 steps"``) a validation value is judged at each evaluation.

    Args:
        name: key in the logs.
        mode: ``"min"``, ``"max"``, or ``"auto"``, which asks the metric for its direction.
        owner: the callback's name, for messages.
        min_delta: smallest change that counts; its sign does not matter.
    """

    def __init__(self, name: str, mode: str, owner: str, min_delta: float = 0.0) -> None:
        if not isinstance(name, str):
            raise ConfigurationError(
                f"{owner}(monitor={name!r}); expected a key of the logs, such as 'val_loss'."
            )
        if mode not in ("auto", "min", "max"):
            raise ConfigurationError(f"{owner}(mode={mode!r}); expected 'auto', 'min' or 'max'.")
        self.name = name
        self._mode = mode
        self._owner = owner
        self._min_delta = abs(number(f"{owner}: min_delta", min_delta))
        self._appeared = False
        self._appears_inside = False

    def start(self) -> None:
        """A new fit: the value has to appear again."""
        self._appeared = False
        self._appears_inside = False

    def state_dict(self) -> dict[str, Any]:
        """Where the value has appeared in this fit."""
        return {"appeared": self._appeared, "appears_inside": self._appears_inside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in a resumed fit."""
        self._appeared, self._appears_inside = state["appeared"], state["appears_inside"]

    def after_validation(self, run: Run, logs: Mapping[str, Any]) -> float | None:
        """The value to judge after a validation, or None."""
        if not run.info.validates_inside_epochs or self.name not in logs:
            return None
        self._appeared = self._appears_inside = True
        return watched(logs, self.name, self._owner)

    def at_epoch_end(self, run: Run, logs: Mapping[str, Any]) -> float | None:
        """The value to judge at an epoch's end, or None.

        Raises:
            UnknownMonitorError: it has not appeared by the end of the first validation epoch
                (without validation data: the first epoch).
        """
        if self._appears_inside:
            return None
        if self.name in logs:
            self._appeared = True
            return watched(logs, self.name, self._owner)
        is_due = not run.info.has_validation or any(key.startswith("val_") for key in logs)
        if not self._appeared and is_due:
            raise UnknownMonitorError(self.name, logs, self._owner)
        return None

    def improves(self, run: Run, value: float, best: float | None) -> bool:
        """Whether ``value`` is strictly better than ``best``. NaN is worse than anything."""
        higher_is_better = self.higher_is_better(run)  # first: it may raise, and then at once
        if math.isnan(value):
            return False
        if best is None:
            return True
        if higher_is_better:
            return value > best + self._min_delta
        return value < best - self._min_delta

    def higher_is_better(self, run: Run) -> bool:
        """The direction, given or declared by the metric.

        Raises:
            ConfigurationError: neither.
        """
        if self._mode != "auto":
            return self._mode == "max"
        higher = run.direction(self.name)
        if higher is None:
            raise ConfigurationError(
                f"{self._owner} monitors {self.name!r}, whose direction nobody declared. Give "
                "mode='min' or mode='max', or set higher_is_better on the metric."
            )
        return higher


def watched(logs: Mapping[str, Any], name: str, owner: str) -> float:
    """The number that is logged under ``name``.

    Raises:
        ConfigurationError: it is a matrix or a dict, of which none is better than another.
    """
    value = logs[name]
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{owner} monitors {name!r}, which is a {type(value).__name__}; expected a key whose "
            "values are numbers, such as 'val_loss'. Change monitor."
        ) from error
