"""A budget of time."""

from __future__ import annotations

import datetime
import math
import re
import time
from numbers import Real
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.errors import ConfigurationError

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}
_PART = re.compile(
    r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)"
    r"(?![a-z])\s*",
    re.IGNORECASE,
)


class Timer(Callback):
    """Ends training, after the current step, when its time is spent.

    The time of a run that is resumed counts from its first start: what the processes before have
    used is gone. Validation, callbacks and compilation count. ``history.stopped_by`` is
    ``"Timer"``. A batch costs one look at the clock.

    Args:
        budget: seconds, a ``datetime.timedelta``, or a text such as ``"12h"``, ``"90 minutes"``,
            ``"1h30m"`` or ``"200ms"``.

    Attributes:
        budget_seconds: the budget.
        elapsed_seconds: what is used of it, over all parts of the run.
        remaining_seconds: what is left, at least 0.

    Example:
        >>> Timer("1h30m").budget_seconds
        5400.0
    """

    def __init__(self, budget: float | str | datetime.timedelta) -> None:
        self.budget_seconds = parse_seconds(budget, "Timer: budget")
        self.due_at: float = math.inf  # told of a batch's end only when the time is up
        self._used_before = 0.0
        self._start: float | None = None

    @property
    def elapsed_seconds(self) -> float:
        """Seconds used, those of earlier parts of a resumed run included."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._used_before + running

    @property
    def remaining_seconds(self) -> float:
        """Seconds left, at least 0."""
        return max(self.budget_seconds - self.elapsed_seconds, 0.0)

    def on_train_begin(self, logs: Any) -> None:
        """Start the clock."""
        self._set_clock(0.0)

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """The time is up: end after this step."""
        self.due_at = math.inf
        self.trainer.request_stop("Timer")

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Start no other epoch once the time is up, which validation may have used."""
        if self.remaining_seconds == 0:
            self.trainer.request_stop("Timer")

    def on_train_end(self, logs: Any) -> None:
        """Stop the clock."""
        self._used_before, self._start = self.elapsed_seconds, None

    def on_exception(self, error: BaseException) -> None:
        """Stop the clock."""
        self._used_before, self._start = self.elapsed_seconds, None

    def _set_clock(self, used_before: float) -> None:
        self._used_before, self._start = used_before, time.perf_counter()
        self.due_at = self._start + max(self.budget_seconds - used_before, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Seconds used so far."""
        return {"elapsed_seconds": self.elapsed_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what is left; a budget given now wins. If nothing is left, ask for the end."""
        self._set_clock(state["elapsed_seconds"])
        if self.remaining_seconds == 0:
            self.trainer.request_stop("Timer")


def parse_seconds(budget: Any, argument: str) -> float:
    """Seconds from a number, a ``timedelta`` or a text.

    Args:
        budget: the time.
        argument: name of the argument it was given as, for the message.

    Raises:
        ConfigurationError: it is none of these, or not positive.

    >>> parse_seconds("2 days 12h", "budget") / 3600
    60.0
    """
    seconds = math.nan
    if isinstance(budget, datetime.timedelta):
        seconds = budget.total_seconds()
    elif isinstance(budget, str):
        if budget.strip() and not _PART.sub("", budget.strip()):
            seconds = sum(float(n) * _SECONDS[_unit(u)] for n, u in _PART.findall(budget))
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        seconds = float(budget)
    if not 0 < seconds < math.inf:
        raise ConfigurationError(
            f"{argument}={budget!r}; expected positive seconds, a timedelta, or a text such as "
            "'12h', '90 minutes' or '1h30m'."
        )
    return seconds


def _unit(text: str) -> str:
    return "ms" if text.lower().startswith(("ms", "milli")) else text[0].lower()
