"""Checks of single arguments, with one wording for all."""

from __future__ import annotations

import operator
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


def boolean(name: str, value: Any) -> bool:
    """``value`` if it is True or False.

    Raises:
        ConfigurationError: it is something else.
    """
    if value is not True and value is not False:
        raise ConfigurationError(f"{name}={value!r}; expected True or False.")
    return value
