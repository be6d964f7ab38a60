"""What ranks agree on, over any :class:`~mlx_fit.protocols.Communicator`; and the one of a process.

Every function here that takes a communicator is collective: all ranks call it at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.errors import ConfigurationError, DistributedError
from mlx_fit.logs import Rows, Sums
from mlx_fit.messages import describe_error, error_of, pack, unpack
from mlx_fit.protocols import Communicator

T = TypeVar("T")


class Alone:
    """The communicator of a process that trains by itself: nothing is sent."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.uneven = "join"
        self.balances = False
        self.rates: tuple[float, ...] | None = None

    def gather(self, message: bytes) -> list[bytes]:
        """Its own message."""
        return [message]

    def sum(self, arrays: list[mx.array]) -> list[mx.array]:
        """The arrays as they are."""
        return arrays

    def at_step(self, step: int) -> None:
        """There is nobody to tell."""

    def knows(self, error: BaseException) -> None:
        """There is nobody to tell."""

    def report(self, error: BaseException) -> None:
        """There is nobody to tell."""


ALONE = Alone()


@contextmanager
def reporting(ranks: Communicator) -> Iterator[None]:
    """Tell the other ranks of an error that is raised inside."""
    try:
        yield
    except BaseException as error:
        ranks.report(error)
        raise


def gather(ranks: Communicator, value: Any, what: str = "values") -> list[Any]:
    """Values of all ranks, by rank: plain ones, NumPy arrays, trees of them.

    Args:
        ranks: the ranks.
        value: this rank's.
        what: what it is, by which ranks notice that they are not at the same place.

    Raises:
        DistributedError: another rank has sent something else.
    """
    if ranks.size == 1:
        return [value]
    messages = [unpack(message) for message in ranks.gather(pack([what, value]))]
    others = {rank: name for rank, (name, _) in enumerate(messages) if name != what}
    if others:
        rank, name = others.popitem()
        error = DistributedError(
            f"Rank {ranks.rank} exchanges {what!r} and rank {rank} {name!r}: they are not at the "
            "same place. All ranks must call fit, evaluate, predict, save and load together, with "
            "equal arguments."
        )
        ranks.knows(error)
        raise error
    return [found for _, found in messages]


def of_first(ranks: Communicator, value: T) -> T:
    """Rank 0's value."""
    if ranks.size == 1:
        return value
    found: T = gather(ranks, value if ranks.rank == 0 else None, "rank 0's value")[0]
    return found


def first_known(ranks: Communicator, value: T | None) -> T | None:
    """The value of the first rank that has one."""
    if ranks.size == 1:
        return value
    found = gather(ranks, value, "a value that is known")
    return next((each for each in found if each is not None), None)


def together(ranks: Communicator, act: Callable[[], T], step: int = 0) -> T:
    """What ``act()`` returns, if it succeeds on all ranks; else all raise the first one's error."""
    if ranks.size == 1:
        return act()
    failure, result = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    described = gather(ranks, None if failure is None else describe_error(failure), "errors")
    if failure is None:
        failed = [(rank, other) for rank, other in enumerate(described) if other is not None]
        failure = error_of(failed[0][1], failed[0][0], step) if failed else None
    if failure is not None:
        ranks.knows(failure)
        raise failure
    return result  # type: ignore[return-value]


def on_first(ranks: Communicator, act: Callable[[], object], step: int = 0) -> None:
    """Do something on rank 0 alone. When it returns it is done; all raise if it fails."""
    together(ranks, act if ranks.rank == 0 else _nothing, step)


def _nothing() -> None:
    """What the other ranks do meanwhile."""


def first_alone(ranks: Communicator, act: Callable[[], T], step: int = 0) -> T:
    """Do something on rank 0, and when that has succeeded on the others."""
    if ranks.size == 1:
        return act()
    found: list[T] = []

    def keep() -> None:
        found.append(act())

    on_first(ranks, keep, step)
    together(ranks, keep if ranks.rank else _nothing, step)
    return found[0]


def check_same(
    ranks: Communicator, settings: Mapping[str, Any], remedy: str = "all ranks need the same."
) -> None:
    """Raise on all ranks unless they have equal plain values.

    Args:
        ranks: the ranks.
        settings: what a value is, for the message -> the value.
        remedy: what to do, for the message.

    Raises:
        ConfigurationError: names the first that differs, and both values.
    """
    if ranks.size == 1:
        return
    found = gather(ranks, {what: repr(v) for what, v in settings.items()}, "settings")
    for rank, other in enumerate(found):
        if other == found[0]:
            continue
        what = next((k for k in [*found[0], *other] if found[0].get(k) != other.get(k)), "order")
        error = ConfigurationError(
            f"{what} is {found[0].get(what, 'missing')} on rank 0 and "
            f"{other.get(what, 'missing')} on rank {rank}; {remedy}"
        )
        ranks.knows(error)
        raise error


def joined_rows(ranks: Communicator, tree: Any) -> Any:
    """The rows of all ranks one after the other, in a tree of NumPy arrays.

    Args:
        ranks: the ranks.
        tree: this rank's rows, or None where it has none.

    Returns:
        None where no rank has any.
    """
    trees = [other for other in gather(ranks, tree, "rows") if other is not None]
    return _concatenated(trees) if trees else None


def _concatenated(trees: list[Any]) -> Any:
    head = trees[0]
    if isinstance(head, dict):
        return {key: _concatenated([tree[key] for tree in trees]) for key in head}
    if isinstance(head, (list, tuple)):
        return type(head)(_concatenated(list(parts)) for parts in zip(*trees, strict=True))
    return np.concatenate(trees) if isinstance(head, np.ndarray) and head.ndim else head


def rows_of_all(ranks: Communicator, rows: Any) -> Any:
    """Rows of metrics, key -> name -> array, of all ranks."""
    if ranks.size == 1:
        return rows
    found = joined_rows(ranks, _on_host(rows) if rows else None)
    return {k: {n: mx.array(a) for n, a in s.items()} for k, s in (found or {}).items()}


def _on_host(rows: Any) -> Any:
    return {
        key: {
            name: np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
            for name, array in state.items()
        }
        for key, state in rows.items()
    }


def join_rows(ranks: Communicator, sums: Sums) -> None:
    """Let metrics that need every row have those of all ranks."""
    if ranks.size == 1:
        return
    found = rows_of_all(ranks, sums.rows.joined())
    sums.rows = Rows()
    sums.rows.is_joined = True
    if found:
        sums.rows.append(found)


def join_sums(ranks: Communicator, sums: Sums) -> None:
    """Add up what the ranks have counted, in float64 and in the order of the ranks."""
    if ranks.size == 1:
        return
    own = {"totals": sums.fold(), "slices": sums.layout.plain()}
    known = [found for found in gather(ranks, own, "sums") if found["slices"]]
    if known:
        sums.widen(max(found["totals"].size for found in known))
        if not sums.layout.slices:
            sums.layout.expect_plain(known[0]["slices"])
    sums.totals = np.zeros(sums.capacity)
    for found in known:
        sums.totals[: found["totals"].size] += found["totals"]
    join_rows(ranks, sums)


def open_window_of_all(ranks: Communicator, window: dict[str, mx.array]) -> dict[str, mx.array]:
    """The sums over the ranks of windows that wait for their update, by name.

    Args:
        ranks: the ranks.
        window: this rank's sums, weights and counts; empty where it has had no samples.
    """
    if ranks.size == 1:
        return window
    shapes = first_known(ranks, {name: [*array.shape] for name, array in window.items()} or None)
    if shapes is None:
        return {}
    arrays = [window.get(name, mx.zeros(shape, mx.float32)) for name, shape in shapes.items()]
    return dict(zip(shapes, ranks.sum(arrays), strict=True))


def open_sums_of_all(ranks: Communicator, sums: Sums) -> dict[str, Any]:
    """What sums of an epoch hold, a window included that waits for the other ranks."""
    found = sums.state_dict()
    if ranks.size == 1:
        return found
    own = sum((np.array(sums.pad(vector), np.float64) for vector in sums.open), np.zeros(1))
    known = [each for each in gather(ranks, [own, found["slices"]], "sums") if each[1]]
    if known:
        sizes = [len(found["totals"]), *(vector.size for vector, _ in known)]
        totals = np.zeros(max(sizes))
        totals[: sizes[0]] = found["totals"]
        for vector, _ in known:
            totals[: vector.size] += vector
        found |= {"totals": totals.tolist(), "slices": known[0][1]}
    if not sums.rows.is_joined:
        found["rows"] = rows_of_all(ranks, found["rows"])
    return found


# --- the update, which all ranks make together ----------------------------------------------------


@dataclass
class Shared:
    """A window of batches, put together from all ranks.

    Attributes:
        window: ``[gradients, weight, num_bad]``: sums over the ranks; empty where there is nothing
            to update with.
        vector: packed sums of the window's logs.
        logs_skip: whether these say that the window was left out.
        is_update: whether it counts, on all ranks together.
    """

    window: list[Any]
    vector: mx.array
    logs_skip: bool
    is_update: bool


class Votes(Protocol):
    """What a rank asks for, and what all of them hear at the same step."""

    def wishes(self) -> list[float]:
        """Numbers to be summed, always as many."""

    def hear(self, totals: list[float]) -> None:
        """Their sums over the ranks."""


class Exchange(Protocol):
    """What the training step needs of the other ranks.

    Attributes:
        votes: what this rank asks for; it goes along with every window.
        rank: this process's.
    """

    votes: Votes
    rank: int

    def begin(self, model: nn.Module, number: int, loaded: float) -> None:
        """A window begins: the ``number``-th, from 0; ``loaded`` is its weight in a checkpoint."""

    def statistics(self, model: nn.Module, window: list[Any]) -> dict[str, mx.array]:
        """Running statistics of all ranks inside a window, by name; collective."""

    def gather_number(self, number: int) -> list[int]:
        """A number of every rank, by rank; collective."""

    def close(self, model: nn.Module, window: list[Any], sums: Sums, number: int) -> Shared:
        """Put the parts of all ranks together; collective.

        Args:
            model: its running statistics are averaged by weight.
            window: this rank's ``[gradients, weight, num_bad]``, empty without samples.
            sums: whose open vectors are this rank's part of the logs.
            number: of the window, from 0.
        """

    def update(self, model: nn.Module, apply: Callable[[], mx.array] | None) -> mx.array | None:
        """Make the update of a window that counts; collective.

        Args:
            model: what is updated.
            apply: does what one process would do, and returns what is logged of it; None on a rank
                that has nothing to update with.
        """

    def finish(self, model: nn.Module) -> None:
        """The fit ends; collective."""
