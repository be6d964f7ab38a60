"""Which widths batches have, and which rows go together: arithmetic on lengths alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_fit.data.order import order

__all__ = ["Batches", "Grid", "best_widths", "bucketed", "choose_grid", "padding", "size"]

_CANDIDATES = 512  # widths that are tried; more of them change the padding by less than 0.1 %
_SMALL = 5000  # rows up to which every number of widths is tried


class Grid(NamedTuple):
    """How rows are put into batches.

    Attributes:
        widths: padded lengths, ascending int64; the last holds the longest row.
        short_is_wide: whether the one short batch is made of long rows, or of short ones.
    """

    widths: np.ndarray
    short_is_wide: bool = False


class Batches(NamedTuple):
    """Batches of an epoch.

    Attributes:
        rows: for each batch the indices of its rows.
        widths: for each batch its padded length.
    """

    rows: list[np.ndarray]
    widths: list[int]


def best_widths(lengths: np.ndarray, most: int) -> list[np.ndarray]:
    """For 1, 2, ... widths those that pad least, if each row is padded to the next one.

    Found by dynamic programming over candidates (all lengths, or quantiles of them): the rows up to
    a candidate, in ``k`` widths, cost what those up to an earlier one cost in ``k - 1``, and then
    the candidate itself for each row between.

    Args:
        lengths: int64 of shape ``(rows,)``.
        most: number of widths at most; there are never more than different lengths.

    Returns:
        Ascending int64 widths; the last is the longest length.
    """
    widths, covered = _candidates(lengths)
    # between[i, j]: positions of the rows after candidate i up to j, all padded to j.
    between = (widths[None, :] * (covered[None, :] - covered[:, None])).astype(np.float64)
    between[np.tril_indices(len(widths))] = np.inf
    cost = (widths * covered).astype(np.float64)
    came_from: list[np.ndarray] = []
    found = [widths[-1:]]
    for _ in range(min(most, len(widths)) - 1):
        total = cost[:, None] + between
        came_from.append(total.argmin(axis=0))
        cost = total.min(axis=0)
        picked = [len(widths) - 1]
        for best in reversed(came_from):
            picked.append(int(best[picked[-1]]))
        found.append(widths[picked[::-1]])
    return found


def _candidates(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending widths, and for each how many rows are no longer."""
    widths, rows = np.unique(lengths, return_counts=True)
    covered = np.cumsum(rows)
    if len(widths) > _CANDIDATES:
        # Half spread over the rows, half over the widths: both many rows and long ones cost.
        marks = np.linspace(0, covered[-1], _CANDIDATES // 2)
        spread = np.linspace(0, len(widths) - 1, _CANDIDATES // 2).astype(int)
        chosen = np.union1d(np.searchsorted(covered, marks), spread)
        widths, covered = widths[chosen], covered[chosen]
    return widths, covered


def choose_grid(lengths: np.ndarray, batch_size: int, max_shapes: int) -> Grid:
    """The grid for :func:`bucketed` with at most ``max_shapes`` (rows, width) pairs.

    More widths pad rows less but leave more queues half full at the end of an epoch, which is what
    small sets suffer from. So some grids are tried on the rows in random order.
    """
    short = len(lengths) % batch_size
    if len(lengths) < batch_size:
        return Grid(lengths.max(keepdims=True))
    most = max(max_shapes - (short > 0), 1)
    tries = 1 if len(lengths) > _SMALL else 5
    orders = [order(0, number, len(lengths))[:] for number in range(tries)]
    found = best_widths(lengths, most)[::-1]
    if len(lengths) > _SMALL:
        found = [widths for widths in found if widths is found[0] or len(widths) % 8 == 0]
    grids = [
        Grid(widths, short_is_wide)
        for widths in found
        for short_is_wide in (False, True)[: 1 + (short > 0)]
    ]

    def positions(grid: Grid) -> int:
        return sum(size(bucketed(lengths, visited, grid, batch_size)) for visited in orders)

    return min(grids, key=positions)


def bucketed(lengths: np.ndarray, visited: np.ndarray, grid: Grid, batch_size: int) -> Batches:
    """The batches of an epoch: a queue for each width; rows left in them are sorted by length.

    All batches are whole but one, if ``batch_size`` does not divide the rows. That one is taken
    from the shortest rows that suffice, or from the longest, as the grid says, so that its shape is
    the same in every epoch.

    Args:
        lengths: int64 of shape ``(rows,)``.
        visited: all rows, in the order of the epoch.
        grid: the widths.
        batch_size: rows of a whole batch.

    Returns:
        Batches; the rows of each are in the order of the epoch.
    """
    widths = grid.widths
    bucket = np.searchsorted(widths, lengths)[visited]
    rows: list[np.ndarray] = []
    used: list[int] = []
    left: list[np.ndarray] = []
    queued, short = visited, len(visited) % batch_size
    if short:
        taken, width = _short_batch(bucket, short, grid)
        rows.append(visited[taken])
        used.append(width)
        queued, bucket = np.delete(visited, taken), np.delete(bucket, taken)
    by_bucket = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=len(widths)))
    for number, (start, end) in enumerate(zip(ends - np.diff(ends, prepend=0), ends, strict=True)):
        queue = queued[by_bucket[start:end]]
        whole = len(queue) - len(queue) % batch_size
        rows += list(queue[:whole].reshape(-1, batch_size))
        used += [int(widths[number])] * (whole // batch_size)
        left.append(queue[whole:])
    rest = np.concatenate(left)
    rest = rest[np.argsort(lengths[rest], kind="stable")].reshape(-1, batch_size)
    used += widths[np.searchsorted(widths, lengths[rest[:, -1]])].tolist()
    when = np.argsort(visited)  # the inverse permutation
    rows += list(np.take_along_axis(rest, np.argsort(when[rest], axis=1), axis=1))
    return Batches(rows, used)


def _short_batch(bucket: np.ndarray, count: int, grid: Grid) -> tuple[np.ndarray, int]:
    """Positions in the order of the rows of the short batch, and its width."""
    rows = np.bincount(bucket, minlength=len(grid.widths))
    if grid.short_is_wide:
        first = len(rows) - 1 - int(np.searchsorted(np.cumsum(rows[::-1]), count))
        return np.flatnonzero(bucket >= first)[:count], int(grid.widths[-1])
    last = int(np.searchsorted(np.cumsum(rows), count))
    return np.flatnonzero(bucket <= last)[:count], int(grid.widths[last])


def size(batches: Batches) -> int:
    """Positions of all batches, padding included."""
    return sum(len(r) * w for r, w in zip(batches.rows, batches.widths, strict=True))


def padding(lengths: np.ndarray, batches: Batches) -> float:
    """The share of positions that are padding."""
    positions = size(batches)
    return 1 - float(lengths.sum()) / positions if positions else 0.0
