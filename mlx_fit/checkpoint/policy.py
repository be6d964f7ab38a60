"""When checkpoints are written, and which are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mlx_fit.checks import boolean, natural
from mlx_fit.errors import ConfigurationError

_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0}


@dataclass(frozen=True)
class CheckpointPolicy:
    """When ``fit`` writes checkpoints, and which of them stay.

    Args:
        every: ``"epoch"``, ``"2 epochs"``, ``"500 steps"``, or a time such as ``"10 minutes"``
            (seconds, minutes, hours), looked at after each step. The end of a fit is saved in any
            case.
        keep_last: how many of the newest stay; None or -1 keeps all.
        keep_best: how many with the best ``monitor`` stay besides.
        monitor: key in the logs, for ``keep_best``. Its direction is the metric's own.
        mode: ``"auto"``, ``"min"`` or ``"max"``, for values whose direction nobody declared.
        background: write in a thread while training goes on. False waits for the disk.
        frozen: ``"write"`` writes frozen parameters as well; ``"expect"`` writes their hashes, and
            a model that resumes must hold the same ones already.

    Raises:
        ConfigurationError: a value is none of these.

    Example:
        >>> CheckpointPolicy("500 steps", keep_last=2).num_steps
        500
    """

    every: str = "epoch"
    keep_last: int | None = 3
    keep_best: int = 0
    monitor: str | None = None
    mode: str = "auto"
    background: bool = True
    frozen: str = "write"
    num_steps: int | None = field(init=False, default=None)
    num_epochs: int | None = field(init=False, default=None)
    num_seconds: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        count, unit = _parsed(self.every)
        if unit == "step":
            object.__setattr__(self, "num_steps", int(count))
        elif unit == "epoch":
            object.__setattr__(self, "num_epochs", int(count))
        else:
            object.__setattr__(self, "num_seconds", count * _SECONDS[unit])
        if self.keep_last == -1:
            object.__setattr__(self, "keep_last", None)
        if self.keep_last is not None:
            natural("keep_last", self.keep_last, 1)
        natural("keep_best", self.keep_best)
        boolean("background", self.background)
        if self.keep_best and not isinstance(self.monitor, str):
            raise ConfigurationError(
                f"CheckpointPolicy(keep_best={self.keep_best}, monitor={self.monitor!r}): the best "
                "are those with the best value of a key in the logs, such as monitor='val_loss'."
            )
        if self.monitor is not None and not self.keep_best:
            raise ConfigurationError(
                f"CheckpointPolicy(monitor={self.monitor!r}) does nothing without keep_best."
            )
        if self.mode != "auto" and self.monitor is None:
            raise ConfigurationError(
                f"CheckpointPolicy(mode={self.mode!r}) does nothing without keep_best and monitor."
            )
        for name, allowed in (("mode", ("auto", "min", "max")), ("frozen", ("write", "expect"))):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"CheckpointPolicy({name}={getattr(self, name)!r}); expected one of "
                    f"{', '.join(map(repr, allowed))}."
                )

    @staticmethod
    def get(value: Any) -> CheckpointPolicy:
        """A policy as it is; a text as :attr:`every` of one."""
        return value if isinstance(value, CheckpointPolicy) else CheckpointPolicy(value)


def _parsed(every: Any) -> tuple[float, str]:
    text = every.strip() if isinstance(every, str) else ""
    if text == "epoch":
        return 1, "epoch"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s+(epoch|step|second|minute|hour)s?", text)
    if match:
        count, unit = float(match[1]), match[2]
        if count > 0 and (unit in _SECONDS or count.is_integer()):
            return count, unit
    raise ConfigurationError(
        f'checkpoint_every={every!r}; expected "epoch", "2 epochs", "500 steps", "10 minutes", or '
        "a CheckpointPolicy."
    )
