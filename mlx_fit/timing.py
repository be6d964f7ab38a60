"""When a fit starts, ends, validates and records."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mlx_fit.checks import natural
from mlx_fit.errors import ConfigurationError


@dataclass(frozen=True)
class Schedule:
    """When a fit starts, ends, validates and records; the arguments of ``fit`` that are numbers."""

    epochs: int = 1
    initial_epoch: int = 0
    max_steps: int | None = None
    steps_per_epoch: int | None = None
    validation_freq: int | list[int] | str = 1
    validation_steps: int | None = None
    log_every: int = 10
    validates_every: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        natural("epochs", self.epochs)
        natural("initial_epoch", self.initial_epoch)
        natural("log_every", self.log_every, 1)
        for name in ("max_steps", "steps_per_epoch", "validation_steps"):
            if getattr(self, name) is not None:
                natural(name, getattr(self, name), 1)
        object.__setattr__(self, "validates_every", _steps_of(self.validation_freq))

    def validates_after(self, epoch: int) -> bool:
        """Whether validation runs at the end of an epoch (0-based)."""
        if self.validates_every is not None:
            return False
        if isinstance(self.validation_freq, list):
            return epoch + 1 in self.validation_freq
        assert isinstance(self.validation_freq, int)
        return (epoch + 1) % self.validation_freq == 0


def _steps_of(validation_freq: Any) -> int | None:
    """The N of "N steps"; None for a frequency in epochs."""
    match = re.fullmatch(r"\s*(\d+)\s+steps?\s*", str(validation_freq))
    if isinstance(validation_freq, str) and match and int(match[1]) > 0:
        return int(match[1])
    whole = validation_freq if isinstance(validation_freq, list) else [validation_freq]
    if whole and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in whole):
        return None
    raise ConfigurationError(
        f"validation_freq={validation_freq!r}; expected a positive int (every so many epochs), a "
        'list of epochs counted from 1, or "500 steps".'
    )
