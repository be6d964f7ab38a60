"""Checks of single arguments, with one wording for all."""

from __future__ import annotations

import math
import operator
import os
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

from mlx_fit.errors import ConfigurationError


def natural(name: str, value: Any, least: int = 0) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigurationError(f"{name}={value!r}; expected an integer of at least {least}.")
    return number


def number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """``value`` as a finite float within limits. NumPy's scalars are numbers, booleans are not.

    Args:
        name: of the argument.
        value: its value.
        least, most: limits that are allowed themselves.
        above, below: limits that are not.

    Raises:
        ConfigurationError: it is something else.
    """
    found = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond floats
            found = float(value)
    if not (math.isfinite(found) and least <= found <= most and above < found < below):
        limits = [f"{word} {limit:g}" for word, limit in
                  (("of at least", least), ("above", above), ("of at most", most), ("below", below))
                  if math.isfinite(limit)]  # fmt: skip
        text = " and ".join(limits).replace("and of", "and")
        raise ConfigurationError(f"{name}={value!r}; expected a number {text}".rstrip() + ".")
    return found


def boolean(name: str, value: Any) -> bool:
    """``value`` if it is True or False.

    Raises:
        ConfigurationError: it is something else.
    """
    if value is not True and value is not False:
        raise ConfigurationError(f"{name}={value!r}; expected True or False.")
    return value


def path_of(name: str, value: Any) -> Path:
    """``value``, a string or a path, as a path.

    Raises:
        ConfigurationError: it is something else.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise ConfigurationError(f"{name}={value!r:.80}; expected a path, as a string or a Path.")
    return Path(value)


def file_of(name: str, value: Any) -> Path:
    """``value`` as the path of a file that is there, or can be made.

    Raises:
        ConfigurationError: it is no path, or that of a folder.
    """
    path = path_of(name, value)
    if path.is_dir():
        raise ConfigurationError(f"{name}={str(path)!r} is a folder; expected the path of a file.")
    return path
