"""Learning rates of MLX optimizers: which have a schedule, and whether somebody assigned one."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError


def optimizers_of(optimizer: Any) -> list[Any]:
    """The optimizer itself, or the parts of a ``MultiOptimizer``."""
    return list(getattr(optimizer, "optimizers", [optimizer]))


def settings(optimizer: Any) -> list[Any]:
    """What a compiled step bakes in of an optimizer: its state's identity, its plain settings."""
    return [
        (id(part), id(part.state), repr([v for k, v in vars(part).items() if k != "_state"]))
        for part in optimizers_of(optimizer)
    ]


class RateGuard:
    """Notices a learning rate that was assigned under a schedule, which would overwrite it.

    Args:
        optimizer: an MLX optimizer, or a ``MultiOptimizer``.

    Raises:
        ConfigurationError: a rate is not the one that its schedule left there.
    """

    def __init__(self, optimizer: Any) -> None:
        parts = [o for o in optimizers_of(optimizer) if "learning_rate" in o._schedulers]
        for part in parts:
            _check_value(part)
        self._states = [part.state for part in parts]
        self.is_needed = bool(parts)
        self.note()

    def note(self) -> None:
        """The rates of now are the schedules'."""
        self._known = [state["learning_rate"] for state in self._states]

    def check(self) -> None:
        """Raise if a rate is another array than the one noted; looks at no value."""
        for state, known in zip(self._states, self._known, strict=True):
            if state["learning_rate"] is not known:
                raise _assigned()


def _check_value(optimizer: Any) -> None:
    schedule, state = optimizer._schedulers["learning_rate"], optimizer.state
    rate, step = float(np.array(state["learning_rate"])), int(np.array(state["step"]))
    # Before the first update it is the schedule's first rate, later that of the newest update.
    expected = float(np.array(schedule(mx.array(max(step - 1, 0), mx.uint64))))
    if not math.isclose(rate, expected, rel_tol=1e-4, abs_tol=1e-12):
        raise _assigned()


def _assigned() -> ConfigurationError:
    return ConfigurationError(
        "optimizer.learning_rate was assigned, but the optimizer has a schedule, which would "
        "overwrite it at the next update. Give the optimizer a plain number, or put the change "
        "into the schedule."
    )
