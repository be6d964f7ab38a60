"""A callback out of functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from mlx_fit.callbacks.base import HOOKS, Callback
from mlx_fit.errors import ConfigurationError


class LambdaCallback(Callback):
    """Calls the functions it is given, by the name of their hook.

    Args:
        hooks: ``on_epoch_end=lambda epoch, logs: ...``, and so on for every hook of
            :class:`Callback`; None for none. Other names become attributes; one that looks like a
            hook warns.

    Raises:
        ConfigurationError: what is given for a hook cannot be called.

    Example:
        >>> callback = LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs["loss"]))
    """

    def __init__(self, **hooks: Callable[..., None] | Any) -> None:
        for name, function in hooks.items():
            if name.startswith("on_") and name not in HOOKS:
                warnings.warn(
                    f"LambdaCallback({name}=...): there is no such hook, so it is never called. "
                    f"Hooks are {', '.join(HOOKS)}.",
                    stacklevel=2,
                )
            if name in HOOKS and function is None:
                continue
            if name in HOOKS and not callable(function):
                raise ConfigurationError(
                    f"LambdaCallback({name}={function!r}); expected a function, or None."
                )
            setattr(self, name, function)
