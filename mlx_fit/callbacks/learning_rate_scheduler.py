"""The learning rate as a function of the epoch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.callbacks.base import Callback
from mlx_fit.errors import ConfigurationError
from mlx_fit.rates import assignable, rate_of, set_rate


class LearningRateScheduler(Callback):
    """Sets the learning rate at the beginning of each epoch.

    For rates that change with every update give the optimizer a schedule instead
    (:mod:`mlx_fit.schedules`).

    Args:
        schedule: ``f(epoch)`` or ``f(epoch, learning_rate)``, where ``epoch`` is absolute and
            0-based and ``learning_rate`` the present rate; returns the new rate. With several
            optimizers (``MultiOptimizer``) it is called for each.
        verbose: 1 prints the rate of each epoch.

    Raises:
        ConfigurationError: ``schedule`` is no function, or does not return a rate; when ``fit``
            starts: the optimizer has a schedule, or no learning rate.

    Example:
        >>> callback = LearningRateScheduler(lambda epoch, rate: rate if epoch < 10 else rate * 0.9)
    """

    def __init__(self, schedule: Callable[..., float], verbose: int = 0) -> None:
        if not callable(schedule):
            raise ConfigurationError(
                f"LearningRateScheduler: schedule={schedule!r}; expected a function f(epoch) or "
                "f(epoch, learning_rate) that returns the rate."
            )
        self.schedule = schedule
        self._verbose = verbose
        self._takes_rate = _takes_two(schedule)
        self._newest_epoch: int | None = None

    def on_train_begin(self, logs: Any) -> None:
        """Make sure that the rate can be set."""
        assignable(self.trainer.optimizer, "LearningRateScheduler")
        self._newest_epoch = None

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Set the rate, once: an epoch that is resumed in its middle has it already."""
        if epoch == self._newest_epoch:
            return
        self._newest_epoch = epoch
        for state in assignable(self.trainer.optimizer, "LearningRateScheduler"):
            arguments = (epoch, rate_of(state)) if self._takes_rate else (epoch,)
            rate = _checked(self.schedule(*arguments), epoch)
            set_rate(state, rate)
            if self._verbose:
                print(
                    f"Epoch {epoch + 1}: LearningRateScheduler setting learning rate to {rate:g}."
                )

    def state_dict(self) -> dict[str, Any]:
        """The epoch whose rate was set."""
        return {"newest_epoch": self._newest_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do not set the rate of a resumed epoch a second time."""
        self._newest_epoch = state["newest_epoch"]


def _takes_two(schedule: Callable[..., Any]) -> bool:
    """Whether a schedule can be called with two positional arguments."""
    try:
        inspect.signature(schedule).bind(0, 0.1)
    except TypeError:
        return False
    except ValueError:  # a built-in function without a signature
        return False
    return True


def _checked(rate: Any, epoch: int) -> float:
    if isinstance(rate, (mx.array, np.ndarray)) and rate.ndim == 0:
        rate = rate.item()
    is_number = isinstance(rate, (int, float, np.number)) and not isinstance(rate, bool)
    if not is_number or not math.isfinite(rate) or rate < 0:
        raise ConfigurationError(
            f"LearningRateScheduler: schedule returned {rate!r} for epoch {epoch}; expected a "
            "finite number of at least 0."
        )
    return float(rate)
