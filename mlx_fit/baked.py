"""What a compiled step has baked in, and a quick look at whether somebody changed it since."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from operator import getitem, is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import leaves
from mlx_fit.modes import PLAIN, fingerprint
from mlx_fit.rates import optimizers_of, settings

MANY = 32  # changes of settings within a fit, each of which compiles the step anew


class BakedIn:
    """The layers of a model, their settings and those of the optimizer, as a step has them.

    To look for a change takes no call for each layer: a few microseconds for a small model.

    Args:
        model: the model.
        optimizer: its optimizer.
        follow: called when something looks changed; asks :meth:`has_changed`.
    """

    def __init__(self, model: nn.Module, optimizer: Any, follow: Callable[[], None]) -> None:
        self._model, self._optimizer = model, optimizer
        self._follow = follow
        self._num_changes = 0
        self.note()

    def note(self) -> None:
        """The settings of now are the step's."""
        self._full = [fingerprint(self._model), settings(self._optimizer)]
        modules, parts = self._model.modules(), optimizers_of(self._optimizer)
        self._live = [vars(owner) for owner in (*modules, self._optimizer, *parts)]
        self._then = [_copied(fields) for fields in self._live]
        held = [pair for module in modules for pair in _held(module)]
        held += [(fields, k) for fields in self._live for k, v in fields.items() if _is_object(v)]
        same = [(c, key, c[key]) for c, key in held if not isinstance(c[key], tuple)]
        # MLX makes the tuples of a model anew with every step, so these are compared by value.
        equal = [(c, key, c[key]) for c, key in held if _is_plain_tuple(c[key])]
        self._containers, self._keys, self._values = _columns(same)
        self._owners, self._places, self._tuples = _columns(equal)
        self._lists = [value for value in self._values if isinstance(value, list)]
        self._sizes = [*map(len, self._lists)]

    def look(self, *_: Any) -> None:
        """The hook that comes after user code. What is the very same object is looked at no more.

        One call for each batch, and no function of this library but itself.
        """
        try:
            if (
                all(map(is_, map(getitem, self._containers, self._keys), self._values))
                and [*map(len, self._lists)] == self._sizes
                and [*map(getitem, self._owners, self._places)] == self._tuples
                and self._live == self._then
            ):
                return
        except Exception:  # something is gone, or cannot be compared: perhaps it has changed
            pass
        self._follow()

    def has_changed(self) -> bool:
        """Whether something was changed since; what is there now is noted."""
        before = self._full
        self.note()
        if self._full == before:
            return False
        self._num_changes += 1
        if self._num_changes == MANY + 1:
            warnings.warn(
                f"Callbacks have changed settings of the model or the optimizer {MANY + 1} times "
                "between batches, and each time the step is compiled anew. Change them less often, "
                "or keep the value in an array (a buffer of the layer).",
                stacklevel=4,
            )
        return True


def _copied(fields: dict[str, Any]) -> dict[str, Any]:
    """With copies of what may be changed in place. Optimizer state is what a step changes."""
    return {
        key: value.copy() if isinstance(value, (set, list, dict)) and key != "_state" else value
        for key, value in fields.items()
    }


def _is_object(value: Any) -> bool:
    """Whether equal is not enough: layers, functions and the like are told apart by identity."""
    return not isinstance(value, (*PLAIN, set, list))


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(leaf, PLAIN) for _, leaf in leaves(value))


def _columns(rows: list[tuple[Any, Any, Any]]) -> tuple[list[Any], list[Any], list[Any]]:
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _held(container: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of all that a layer holds, but arrays, which every update replaces."""
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in pairs:
        if isinstance(value, mx.array):
            continue
        yield container, key
        if isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
            yield from _held(value)
