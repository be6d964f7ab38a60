"""Learning rates of MLX optimizers: which have a schedule, and whether somebody assigned one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError

SAMPLES = (0, 1, 10, 100, 1000, 10_000)  # updates at which a schedule is looked at


def optimizers_of(optimizer: Any) -> list[Any]:
    """The optimizer itself, or the parts of a ``MultiOptimizer``."""
    return list(getattr(optimizer, "optimizers", [optimizer]))


def settings(
    optimizer: Any, apart: Mapping[int, Collection[str]] = MappingProxyType({})
) -> list[Any]:
    """What a compiled step bakes in of an optimizer: its state's identity, its plain settings.

    Args:
        optimizer: an MLX optimizer, or a ``MultiOptimizer``.
        apart: names of settings that nothing is computed from, by the ``id`` of their optimizer.
    """
    found = []
    for part in optimizers_of(optimizer):
        others = {"_state", *apart.get(id(part), ())}
        plain = [told(value) for key, value in vars(part).items() if key not in others]
        found.append((id(part), id(part.state), plain))
    return found


def told(value: Any) -> Any:
    """A value to compare with later, of whatever kind. Arrays are not read: they may be traced."""
    if isinstance(value, (list, tuple)):
        return [told(part) for part in value]
    if isinstance(value, dict):
        return [(key, told(part)) for key, part in value.items()]
    try:
        return id(value) if isinstance(value, mx.array) else repr(value)
    except Exception:  # of an object that holds such arrays
        return id(value)


def described(optimizer: Any) -> dict[str, Any]:
    """An optimizer's kind and settings as plain values: what a run was started with."""
    found: dict[str, Any] = {}
    parts = optimizers_of(optimizer)
    for number, part in enumerate(parts):
        prefix = "optimizer" if len(parts) == 1 else f"optimizer[{number}]"
        found[prefix] = type(part).__name__
        scheduled = "learning_rate" in part._schedulers
        found[f"{prefix}.learning_rate"] = (
            _sampled(part._schedulers["learning_rate"])
            if scheduled
            else _number(part.state.get("learning_rate"))
        )
        for name, value in vars(part).items():
            plain = value if isinstance(value, (list, tuple)) else [value]
            if not name.startswith("_") and all(
                v is None or isinstance(v, (bool, int, float, str)) for v in plain
            ):
                found[f"{prefix}.{name}"] = list(value) if plain is value else value
    return found


def _sampled(schedule: Any) -> str:
    """A schedule as some of its values, which is what tells it from another."""
    try:
        values = [f"{float(np.array(schedule(mx.array(n)))):.6g} at {n}" for n in SAMPLES]
    except Exception:  # it may end somewhere: a table, for instance
        return "a schedule"
    return f"a schedule ({', '.join(values)})"


def _number(rate: mx.array | None) -> float | None:
    return None if rate is None else float(np.array(rate))


def rates_of(optimizer: Any) -> list[mx.array | None]:
    """The learning rate of each part; None for one with a schedule."""
    return [
        None if "learning_rate" in part._schedulers else part.state.get("learning_rate")
        for part in optimizers_of(optimizer)
    ]


def set_rates(optimizer: Any, rates: list[mx.array | None]) -> None:
    """Set rates from :func:`rates_of`, in place."""
    for part, rate in zip(optimizers_of(optimizer), rates, strict=True):
        if rate is not None:
            part.state["learning_rate"] = rate


def follow_schedules(optimizer: Any) -> None:
    """Where a restored rate is not that of its schedule, which is a new one, take the new one's."""
    for part in optimizers_of(optimizer):
        if "learning_rate" in part._schedulers:
            expected = _expected(part)
            if not _is_close(part.state["learning_rate"], expected):
                part.state["learning_rate"] = expected
                mx.eval(expected)


class OptimizerSetup:
    """An optimizer as the user made it, before training or a callback changed its rates.

    Attributes:
        optimizer: the optimizer, or None.
        settings: its kind and settings, as plain values.
        rates: its learning rates.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.settings = {} if optimizer is None else described(optimizer)
        self.rates = [] if optimizer is None else rates_of(optimizer)


def assignable(optimizer: Any, owner: str) -> list[dict[str, Any]]:
    """The optimizer states whose ``learning_rate`` a callback may set, one per optimizer part.

    Args:
        optimizer: an MLX optimizer, or a ``MultiOptimizer``.
        owner: the callback's name, for the message.

    Raises:
        ConfigurationError: a schedule sets the rate, or there is none.
    """
    parts = optimizers_of(optimizer)
    if any("learning_rate" in part._schedulers for part in parts):
        raise ConfigurationError(
            f"{owner} sets the learning rate, but the optimizer has a schedule, which would "
            f"overwrite it at the next update. Make the optimizer with learning_rate=<a number>, "
            f"or leave {owner} out."
        )
    states = [part.state for part in parts if "learning_rate" in part.state]
    if not states:
        raise ConfigurationError(
            f"{owner} sets the learning rate, but {type(optimizer).__name__} has none. Make it "
            f"with learning_rate=<a number>, or leave {owner} out."
        )
    return states


def rate_of(state: dict[str, Any]) -> float:
    """The learning rate of an optimizer state. Reads the device."""
    return float(np.array(state["learning_rate"]))


def set_rate(state: dict[str, Any], rate: float) -> None:
    """Set the learning rate that the next update takes; no step is traced anew for it."""
    known = state["learning_rate"].dtype
    dtype = known if mx.issubdtype(known, mx.floating) else mx.float32
    state["learning_rate"] = mx.array(rate, dtype)


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
    if not _is_close(optimizer.state["learning_rate"], _expected(optimizer)):
        raise _assigned()


def _expected(optimizer: Any) -> mx.array:
    """Before the first update the schedule's first rate, later that of the newest update."""
    schedule, step = optimizer._schedulers["learning_rate"], optimizer.state["step"]
    return mx.array(schedule(mx.array(max(int(np.array(step)) - 1, 0), mx.uint64)))


def _is_close(rate: mx.array, expected: mx.array) -> bool:
    return math.isclose(
        float(np.array(rate)), float(np.array(expected)), rel_tol=1e-4, abs_tol=1e-12
    )


def _assigned() -> ConfigurationError:
    return ConfigurationError(
        "optimizer.learning_rate was assigned, but the optimizer has a schedule, which would "
        "overwrite it at the next update. Give the optimizer a plain number, or put the change "
        "into the schedule."
    )
