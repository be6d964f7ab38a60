"""What an experiment tracker must offer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from mlx_fit.errors import ConfigurationError


@runtime_checkable
class Logger(Protocol):
    """Takes a run's numbers somewhere. One object is one run, and is opened when it is first used.

    Example:
        >>> class Printing:
        ...     def log_config(self, config):
        ...         print(sorted(config))
        ...
        ...     def log_scalars(self, values, step):
        ...         print(step, values)
        ...
        ...     def close(self, error=None):
        ...         print("done" if error is None else error)
        >>> isinstance(Printing(), Logger)
        True
    """

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take the run's arguments: nested dicts of plain values. Called first."""

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take values by name. ``step`` counts updates and never falls, but may come again."""

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended, by this error or well. Logging again goes on with the same run."""


@runtime_checkable
class ResumableLogger(Logger, Protocol):
    """A logger whose run goes on when training is resumed from a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Which run this is, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that run, without writing twice what it has already."""


def require(package: str, logger: str, install: str) -> None:
    """Raise now, and not when training starts, if a logger's package is missing."""
    if find_spec(package) is None:
        raise ConfigurationError(f"{logger} needs the package {install}: pip install {install}")


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted names.

    >>> dict(flat({"fit": {"epochs": 2}, "loss": "mse"}))
    {'fit.epochs': 2, 'loss': 'mse'}
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Past:
    """Tells which values a run that goes on has already, so that none is written twice.

    Args:
        logger: its name, for the warning.

    Attributes:
        is_resumed: whether a checkpoint named the run. Then values that it has already are the
            same; otherwise somebody starts anew with a logger that was used.
    """

    def __init__(self, logger: str) -> None:
        self.is_resumed = False
        self._logger = logger
        self._has_warned = False

    def holds(self, step: int, last: int | None) -> bool:
        """Whether a run that had come to ``last`` before it was taken up has this step."""
        if last is None or step > last:
            return False
        if not self.is_resumed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._logger}: the run has values up to step {last} already; those of steps up "
                "to there are left out. A training that starts anew needs a logger of its own.",
                stacklevel=3,
            )
        return True
