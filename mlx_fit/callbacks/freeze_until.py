"""Train some parts of a model later than the others."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, cast

import mlx.nn as nn

from mlx_fit._tree import named_arrays
from mlx_fit.callbacks.base import Callback
from mlx_fit.checks import natural
from mlx_fit.errors import ConfigurationError


class FreezeUntil(Callback):
    """Keeps parts of the model frozen in the epochs before ``epoch``, then trains them too.

    Only what was trainable when ``fit`` started is frozen and thawed: running statistics, a frozen
    base under LoRA and what the user froze stay as they are. Layers are not put into evaluation
    mode: batch normalisation in a frozen part goes on counting. What is frozen when ``fit`` ends
    is trainable again afterwards.

    Args:
        epoch: the first epoch (absolute, 0-based) in which the parts are trained.
        parts: module names as in ``model.named_modules()``, patterns of them (``"layers.*"``), or
            modules of the model; one or a list. A module stands for everything inside it, a name
            of a parameter for itself.

    Raises:
        ConfigurationError: a part is not in the model, or has nothing to train (when ``fit``
            starts).

    Example:
        >>> callback = FreezeUntil(3, ["encoder", "embedding"])
    """

    def __init__(self, epoch: int, parts: str | nn.Module | Iterable[str | nn.Module]) -> None:
        self.epoch = natural("FreezeUntil: epoch", epoch)
        several = isinstance(parts, Iterable) and not isinstance(parts, (str, nn.Module))
        whole: list[Any] = [*cast("Any", parts)] if several else [parts]
        if not whole or not all(isinstance(part, (str, nn.Module)) for part in whole):
            raise ConfigurationError(
                f"FreezeUntil: parts={parts!r}; expected names or patterns of modules, or modules."
            )
        self._parts = whole
        self._chosen: list[tuple[nn.Module, list[str]]] = []
        self._is_frozen = False

    def on_train_begin(self, logs: Any) -> None:
        """Find the parts."""
        self._chosen = _owners(self.model, self._names())
        self._is_frozen = False
        self._follow(self.trainer.info.initial_epoch)

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Freeze or thaw, before the step of the epoch is made."""
        self._follow(epoch)

    def on_train_end(self, logs: Any) -> None:
        """Leave the model as it was found."""
        self._set(False)

    def on_exception(self, error: BaseException) -> None:
        """Leave the model as it was found."""
        self._set(False)

    def state_dict(self) -> dict[str, Any]:
        """Whether the parts are frozen."""
        return {"is_frozen": self._is_frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was; the next epoch decides anew."""
        self._set(state["is_frozen"])

    def _follow(self, epoch: int) -> None:
        self._set(epoch < self.epoch)

    def _set(self, freezes: bool) -> None:
        if freezes != self._is_frozen:
            for module, keys in self._chosen:
                change = module.freeze if freezes else module.unfreeze
                change(recurse=False, keys=keys)
            self._is_frozen = freezes

    def _names(self) -> set[str]:
        """The names of the trainable parameters to freeze."""
        trainable = [name for name, _ in named_arrays(self.model.trainable_parameters())]
        paths = {id(module): name for name, module in self.model.named_modules()}
        chosen: set[str] = set()
        for part in self._parts:
            pattern = paths.get(id(part)) if isinstance(part, nn.Module) else part
            if pattern is None:
                raise ConfigurationError(
                    f"FreezeUntil: parts holds a {type(part).__name__} that is not in the model."
                )
            found = {name for name in trainable if _is_inside(name, pattern)}
            if not found:
                shown = [name for name in paths.values() if name][:20]
                raise ConfigurationError(
                    f"FreezeUntil: {pattern!r} names nothing that is trained. Modules of the model "
                    f"are {', '.join(shown) or 'none'}{', ...' if len(paths) > 21 else ''}."
                )
            chosen |= found
        return chosen


def _is_inside(name: str, pattern: str) -> bool:
    """Whether a parameter is, or lies in, what the pattern matches. ``""`` is the whole model."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes)


def _owners(model: nn.Module, names: set[str]) -> list[tuple[nn.Module, list[str]]]:
    """Each module with the keys of its own that hold parameters among ``names``."""
    modules = dict(model.named_modules())
    keys: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = name.split(".")
        depth = max(n for n in range(len(parts)) if ".".join(parts[:n]) in modules)
        own = keys.setdefault(".".join(parts[:depth]), [])
        if parts[depth] not in own:
            own.append(parts[depth])
    return [(modules[path], own) for path, own in keys.items()]
