"""What a compiled step has baked in, and a quick look at whether somebody changed it since."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import getitem, is_
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import leaves, named_arrays
from mlx_fit.modes import PLAIN, fingerprint, plain_in
from mlx_fit.rates import optimizers_of, settings, told

R = TypeVar("R")
# Layers and optimizers by id, and the names that they had when first traced: a second fit, or
# another Trainer of the same model, must not take notes of the first for settings.
_FIRST: dict[int, tuple[weakref.ref[Any], set[str]]] = {}
MANY = 32  # changes of settings within a fit, each of which compiles the step anew


class BakedIn:
    """The layers of a model, their settings and those of the optimizer, as a step has them.

    To look for a change takes no call for each layer: a few microseconds for a small model.

    Notes that users leave on a model or an optimizer are no settings: names that neither the object
    nor its class had when the step was first traced, and what every forward pass sets anew, as a
    counter of its calls.

    Args:
        model: the model.
        optimizer: its optimizer.
        follow: called when something looks changed; asks :meth:`has_changed`.
    """

    def __init__(self, model: nn.Module, optimizer: Any, follow: Callable[[], None]) -> None:
        self._model, self._optimizer = model, optimizer
        self._follow = follow
        self._num_changes = 0
        self._is_traced = False
        self._known: dict[int, tuple[Any, set[str]]] = {}  # the object too: ids are used again
        self._set_before: set[tuple[int, str]] = set()  # by a forward pass, once
        self._set_again: set[tuple[int, str]] = set()
        self._live: list[Any] = []
        self._then: list[Any] = []
        self._lists: list[Any] = []
        self.note()

    def note(self) -> None:
        """The settings of now are the step's."""
        modules, parts = self._model.modules(), optimizers_of(self._optimizer)
        owners = [*modules, self._optimizer, *parts]
        then = self._known if self._is_traced else {}
        self._known = {id(o): then.get(id(o)) or (o, _known_of(o)) for o in owners}
        self._set_before = {place for place in self._set_before if place[0] in self._known}
        self._set_again &= self._set_before
        apart = self.apart()
        self._full = [fingerprint(self._model, apart), settings(self._optimizer, apart)]
        self._watch(owners, apart)

    def _watch(self, owners: list[Any], apart: dict[int, set[str]]) -> None:
        """Lay out what :meth:`look` compares: whole objects, but those with names set apart."""
        self._live, self._then, self._lists = [], [], []
        rows, copies = [], []  # of containers, keys and values
        for owner in owners:
            fields, without = vars(owner), apart[id(owner)]
            copied = _copied({k: v for k, v in fields.items() if k not in without})
            if without:
                self._lists.append(fields)  # a new name shows in its length
                copies += [(fields, key, value) for key, value in copied.items()]
            else:
                self._live.append(fields)
                self._then.append(copied)
            if isinstance(owner, nn.Module):
                rows += [(c, key, c[key]) for c, key in _held(owner, without)]
            rows += [(fields, key, fields[key]) for key in copied if _is_object(fields[key])]
        same = [row for row in rows if not isinstance(row[2], tuple)]
        # MLX makes the tuples of a model anew with every step, so these are compared by value.
        equal = [row for row in rows if _is_plain_tuple(row[2])]
        self._containers, self._keys, self._values = _columns(same)
        self._owners, self._places, self._copies = _columns(equal + copies)
        self._lists += [value for value in self._values if isinstance(value, list)]
        self._sizes = [*map(len, self._lists)]

    def apart(self) -> dict[int, set[str]]:
        """Names of what is no setting now, by the ``id`` of the object that has it."""
        found = {
            at: {n for n in _names(o) if n not in names and not hasattr(type(o), n)}
            for at, (o, names) in self._known.items()
        }
        for at, name in self._set_again:
            found.setdefault(at, set()).add(name)
        return found

    def everything(self) -> list[Any]:
        """What a step is built for: settings, and also shapes and dtypes.

        A callback that changes these makes MLX trace again, unguarded.
        """
        arrays = named_arrays([self._model.state, self._optimizer.state])
        shapes = [(n, a.shape, a.dtype) for n, a in arrays if isinstance(a, mx.array)]
        apart = self.apart()
        return [*fingerprint(self._model, apart), settings(self._optimizer, apart), shapes]

    def _noted(self) -> dict[tuple[int, str], Any]:
        """What a forward pass or an update may set: a plain copy, by object and name."""
        found = {(id(m), k): plain_in(v) for m in self._model.modules() for k, v in m.items()}
        owners = (*self._model.modules(), *optimizers_of(self._optimizer))
        fields = (
            (id(owner), name, value) for owner in owners for name, value in vars(owner).items()
        )
        return found | {
            (at, name): told(value)
            for at, name, value in fields
            if name not in ("_state", "_training", "_no_grad")
        }

    def tracing(self, trace: Callable[[], R]) -> R:
        """Trace the step: what there is then, is the step's, and what that sets is no change."""
        before = self._noted()
        results = trace()
        now = self._noted()
        changed = {place for place in now if place not in before or now[place] != before[place]}
        for at, name in changed - before.keys():
            if at in self._known:  # made by a forward pass when it first needs it
                self._known[at][1].add(name)
        # A single time may be the first use of a layer. Again and again it is counting.
        self._set_again |= changed & self._set_before
        self._set_before |= changed
        self.note()
        self._is_traced = True
        _remember(self._known.values())
        return results

    def look(self, *_: Any) -> None:
        """The hook that comes after user code. What is the very same object is looked at no more.

        One call for each batch, and no function of this library but itself.
        """
        try:
            if (
                all(map(is_, map(getitem, self._containers, self._keys), self._values))
                and [*map(len, self._lists)] == self._sizes
                and [*map(getitem, self._owners, self._places)] == self._copies
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


def _names(owner: Any) -> set[str]:
    """What an object holds, by name; of a layer its parameters and layers too."""
    return {*vars(owner), *(owner if isinstance(owner, nn.Module) else ())}


def _known_of(owner: Any) -> set[str]:
    """What it held at its first trace, in this fit or another; until then, what it holds."""
    reference, names = _FIRST.get(id(owner), (None, set()))
    return names if reference is not None and reference() is owner else _names(owner)


def _remember(known: Iterable[tuple[Any, set[str]]]) -> None:
    gone = [at for at, (reference, _) in [*_FIRST.items()] if reference() is None]
    for at in gone:
        _FIRST.pop(at, None)
    for owner, names in known:
        _FIRST.setdefault(id(owner), (weakref.ref(owner), names))


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


def _held(container: Any, without: Collection[str] = ()) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of all that a layer holds, but arrays, which every update replaces."""
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in pairs:
        if isinstance(value, mx.array) or key in without:
            continue
        yield container, key
        if isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
            yield from _held(value)
