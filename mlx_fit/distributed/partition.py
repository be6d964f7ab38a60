"""Which rank updates which part of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Sizes = Mapping[str, tuple[int, str]]  # name -> number of elements, dtype


@dataclass(frozen=True)
class Partition:
    """Spans of parameters, by rank.

    Attributes:
        sizes: name -> number of elements and dtype of what is divided.
        spans: for each rank name -> first element of its part and the one after the last.
        is_flat: whether parts are flat pieces of parameters; else they are whole.
    """

    sizes: Sizes
    spans: list[dict[str, tuple[int, int]]]
    is_flat: bool


def elementwise(sizes: Sizes, num_ranks: int) -> Partition:
    """Equal pieces of each dtype's parameters, laid end to end.

    Example:
        >>> sizes = {"weight": (6, "float32"), "bias": (2, "float32")}
        >>> elementwise(sizes, 2).spans
        [{'weight': (0, 4)}, {'weight': (4, 6), 'bias': (0, 2)}]
    """
    spans: list[dict[str, tuple[int, int]]] = [{} for _ in range(num_ranks)]
    for dtype in dict.fromkeys(kind for _, kind in sizes.values()):
        named = {name: size for name, (size, kind) in sizes.items() if kind == dtype}
        each = -(-sum(named.values()) // num_ranks)
        offset = 0
        for name, size in named.items():
            for rank in range(num_ranks):
                start = max(rank * each - offset, 0)
                stop = min((rank + 1) * each - offset, size)
                if start < stop:
                    spans[rank][name] = (start, stop)
            offset += size
    return Partition(sizes, spans, is_flat=True)


def whole_parameters(sizes: Sizes, num_ranks: int) -> Partition:
    """Whole parameters, the largest first to the rank that has least."""
    spans: list[dict[str, tuple[int, int]]] = [{} for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name][0], name)):
        rank = loads.index(min(loads))
        spans[rank][name] = (0, sizes[name][0])
        loads[rank] += sizes[name][0]
    return Partition(sizes, spans, is_flat=False)


def on_rank_0(sizes: Sizes, num_ranks: int) -> Partition:
    """Everything on rank 0."""
    first = {name: (0, size) for name, (size, _) in sizes.items()}
    return Partition(sizes, [first, *({} for _ in range(num_ranks - 1))], is_flat=False)
