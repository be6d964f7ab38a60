"""Trees of arrays: nested dicts, lists and tuples, with paths for messages and in-place restoring.

``mlx.utils`` maps and flattens; this adds what a trainer needs beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)``, where everything that is not a dict, list or tuple is a leaf."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree with their dotted names, as MLX names parameters."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def named_buffers(model: Any) -> dict[str, mx.array]:
    """The arrays that a model keeps and does not train: those under names with an underscore."""
    parameters = {name for name, _ in named_arrays(model.parameters())}
    return {
        name: value
        for name, value in named_arrays(model.state)
        if name not in parameters and isinstance(value, mx.array)
    }


def snapshot(tree: Any) -> Any:
    """Copy the containers of ``tree``, keeping the very same leaves."""
    if isinstance(tree, dict):
        return {key: snapshot(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [snapshot(value) for value in tree]
    return tree


def assign(tree: Any, named: Iterable[tuple[str, Any]]) -> None:
    """Set leaves of ``tree`` in place by the dotted names that :func:`named_arrays` gives them.

    ``mlx.utils.tree_unflatten`` takes a dict with keys like ``"0"`` for a list; this does not, and
    keys may hold dots.

    Raises:
        KeyError: ``tree`` has no such leaf.
    """
    for name, value in named:
        set_leaf(*place(tree, name), value)


def place(tree: Any, name: str) -> tuple[Any, Any]:
    """The container and the key of the leaf with a dotted name."""
    if isinstance(tree, dict) and name in tree:
        return tree, name
    parts = name.split(".")
    if isinstance(tree, (list, tuple)) and parts[0].isdigit() and int(parts[0]) < len(tree):
        number = int(parts[0])
        return (tree, number) if len(parts) == 1 else place(tree[number], ".".join(parts[1:]))
    if isinstance(tree, dict):
        for end in range(1, len(parts)):  # usually the first fits
            if (key := ".".join(parts[:end])) in tree:
                with contextlib.suppress(KeyError):
                    return place(tree[key], ".".join(parts[end:]))
    raise KeyError(name)


def restore(tree: Any, saved: Any) -> None:
    """Put the leaves of ``saved`` (from :func:`snapshot`) back into the containers of ``tree``.

    Works in place, so that whoever holds the tree (a compiled function, an optimizer) sees it.
    """
    if isinstance(tree, dict):
        for key in [key for key in tree if key not in saved]:
            dict.__delitem__(tree, key)
        items: Any = saved.items()
    else:
        if isinstance(tree, list):
            del tree[len(saved) :]
        items = enumerate(saved)
    for key, value in items:
        present = tree.get(key) if isinstance(tree, dict) else tree[key]
        if isinstance(present, (dict, list, tuple)) and isinstance(value, (dict, list)):
            restore(present, value)
        elif not isinstance(tree, tuple):
            set_leaf(tree, key, value)


def select(condition: mx.array, tree: Any, saved: Any) -> None:
    """Keep the leaves of ``tree`` where ``condition`` holds, else those of ``saved``, in place.

    What is new since ``saved`` was taken (a model may keep its last activations) stays.
    """
    for key in saved if isinstance(saved, dict) else range(len(saved)):
        value, before = tree[key], saved[key]
        if isinstance(value, (dict, list, tuple)):
            select(condition, value, before)
        elif isinstance(value, mx.array) and value is not before:
            set_leaf(tree, key, mx.where(condition, value, before))


def set_leaf(container: Any, key: Any, value: Any) -> None:
    """Set a leaf, past ``Module.__setattr__``: a Module is a dict that already has the key."""
    if isinstance(container, dict):
        dict.__setitem__(container, key, value)
    else:
        container[key] = value


class RandomState:
    """MLX's global random key, kept as its two words: the key itself can be a tracer later.

    Attributes:
        words: the key's two 32-bit words; read from the current key unless given.
    """

    def __init__(self, words: Sequence[int] | None = None) -> None:
        # Host synchronisation, but of the key alone, which is evaluated with every step.
        state: Any = mx.random.state
        self.words: list[int] = state[0].tolist() if words is None else list(words)

    def restore(self) -> None:
        """Make this key MLX's current one again."""
        mx.random.seed((self.words[0] << 32) | self.words[1])
        mx.eval(mx.random.state)  # a lazy key could not be used by another thread
