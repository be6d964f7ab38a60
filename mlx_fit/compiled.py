"""Functions compiled over captured state, and what MLX leaves to their caller.

This is the only place that calls ``mx.compile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from mlx_fit._tree import RandomState, leaves, restore, snapshot
from mlx_fit.batch import describe

MAX_SHAPES = 32


class Traced:
    """A function compiled over captured state, whose failing trace leaves that state whole.

    Args:
        function: what to compile.
        state: containers whose arrays the function reads; the random state is the last of them.
        outputs: those of them that it writes; the others are as before after every call.
        compile: False calls the function as it is.

    Attributes:
        function: the compiled function, to be called directly for keys in :attr:`seen`.
        seen: keys that were traced before. Stays empty without compilation, where every call may
            raise in the user's code.
        num_traces: how often the function was traced.
    """

    def __init__(
        self, function: Callable[..., Any], state: list[Any], outputs: list[Any], compile: bool
    ) -> None:
        self.num_traces = 0
        self.seen: set[Any] = set()
        self._state = state
        self._compiles = compile
        self._keeps = len(outputs) < len(state)

        def counted(*args: Any) -> Any:
            self.num_traces += 1
            return function(*args)

        self.function = mx.compile(counted, inputs=state, outputs=outputs) if compile else counted

    def __call__(self, key: Any, *args: Any) -> Any:
        """Call the function for a key that may be new: MLX traces, and user code may raise."""
        if key in self.seen:
            return self.function(*args)
        saved, random_state = [snapshot(part) for part in self._state[:-1]], RandomState()
        try:
            results = self.function(*args)
        except BaseException:
            self._put_back(saved)
            random_state.restore()
            raise
        has_grown = [[*names(part)] for part in self._state[:-1]] != [[*names(p)] for p in saved]
        if self._keeps:
            self._put_back(saved)
        if self._compiles and not has_grown:  # a forward pass that stores arrays is traced again
            self.seen.add(key)
        return results

    def _put_back(self, saved: list[Any]) -> None:
        for part, kept in zip(self._state[:-1], saved, strict=True):
            restore(part, kept)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays alone, compiled: what it does to each element becomes one kernel."""
    compiled: Callable[..., Any] = mx.compile(function)
    return compiled


def names(tree: Any) -> Iterator[str]:
    """The dotted names of a tree's arrays."""
    return (name for name, leaf in leaves(tree) if isinstance(leaf, mx.array))


def evaluate_again(error: RuntimeError, *live: Any) -> None:
    """``mx.eval`` once more if a signal killed the compiler that MLX runs on the CPU.

    A terminal sends Ctrl-C to the whole foreground group, and MLX's ``g++`` dies of it, while our
    handler only takes a note. Any other error is raised as it is.
    """
    if not str(error).startswith(("Could not load C++ shared library", "[Compile::eval_cpu]")):
        raise error
    mx.eval(*live)


def warn_of_many_shapes(shapes: dict[Any, str], key: Any, batch: Any) -> None:
    """Note a new batch shape; each costs a compilation and memory that MLX never gives back."""
    shapes.setdefault(key, describe(batch))
    if len(shapes) == MAX_SHAPES + 1:
        newest = "; ".join(list(shapes.values())[-4:])
        warnings.warn(
            f"The step was compiled for {len(shapes)} different batch shapes, and each costs time "
            f"and memory that is not given back. The newest: {newest}. Pad batches to a few "
            "fixed lengths, or use drop_last for the last short one.",
            stacklevel=3,
        )
