"""Which rows make which batch, from any position on. Imports layer 2: data.fetch."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from mlx_fit.data.fetch import Indices, add_position
from mlx_fit.data.order import FeistelOrder
from mlx_fit.errors import DataError, ResumeError

__all__ = ["from_batch_sampler", "from_order", "from_sampler", "from_stream", "warn_of_discarding"]


def from_order(
    rows: range | np.ndarray | FeistelOrder, size: int, drop_last: bool, start: int
) -> Iterator[Indices]:
    """``rows`` cut into batches, from sample ``start`` on, without reading those before it."""
    num_rows = len(rows)
    stop = num_rows - (num_rows - start) % size if drop_last else num_rows
    # Built from C iterators, so that nothing of ours is called per batch.
    slices = map(slice, range(start, stop, size), range(start + size, stop + size, size))
    return map(rows.__getitem__, slices)


def from_sampler(
    sampler: Iterable[int], size: int, drop_last: bool, epoch: int, start: int
) -> Iterator[Indices]:
    """The sampler's indices in batches, from sample ``start`` on."""
    _announce(sampler, epoch)
    indices = map(operator.index, islice(sampler, start, None))
    is_first = start == 0
    while batch := list(islice(indices, size)):
        if drop_last and len(batch) < size:
            if is_first:
                raise _nothing_left(len(batch), size)
            return
        yield batch
        is_first = False


def _nothing_left(num_samples: int, size: int) -> DataError:
    return DataError(
        f"{num_samples} samples, batch_size {size}, drop_last: 0 batches. Use a smaller batch_size "
        "or drop_last=False."
    )


def from_batch_sampler(
    batch_sampler: Iterable[Indices], epoch: int, start: int
) -> tuple[int, Iterator[Indices]]:
    """The number of the batch that begins at sample ``start``, and the batches from it on."""
    _announce(batch_sampler, epoch)
    batches = iter(batch_sampler)
    number = passed = 0
    while passed < start and (batch := next(batches, None)) is not None:
        passed += len(batch)
        number += 1
    if passed != start:
        raise ResumeError(
            f"The state was saved after {start} samples, but the batch_sampler has no batch that "
            f"ends there (the nearest ends after {passed}). It must repeat an epoch's batches."
        )
    return number, batches


def warn_of_discarding(rows: Iterable[Any], start: int) -> None:
    """Say that going to sample ``start`` of a stream reads the rows before it."""
    warnings.warn(
        f"To resume, the first {start} rows are read and discarded: the dataset, a "
        f"{type(rows).__name__}, cannot be asked for a row by its index. With state_dict and "
        "load_state_dict it could go to its place at once.",
        stacklevel=3,
    )


def from_stream(
    rows: Any, size: int, drop_last: bool, epoch: int, start: int, dataset_state: Any = None
) -> Iterator[list[Any]]:
    """The rows of an iterable in batches, from sample ``start`` on.

    With a ``dataset_state``, which was saved there, the iterable goes there by itself. Else the
    rows before it are read and lost.
    """
    _announce(rows, epoch)
    if dataset_state is not None:
        rows.load_state_dict(dataset_state)
    iterator = iter(rows)
    num_discarded = 0 if dataset_state is not None else start
    count = start
    try:
        if sum(1 for _ in islice(iterator, num_discarded)) < num_discarded:
            raise ResumeError(
                f"The state was saved after {start} samples, but the dataset has fewer now."
            )
        while True:
            batch: list[Any] = []
            for row in islice(iterator, size):
                batch.append(row)
                count += 1
            if batch and drop_last and count < size:
                raise _nothing_left(count, size)
            if not batch or (drop_last and len(batch) < size):
                return
            yield batch
    except Exception as error:
        add_position(error, f"sample {count}", epoch, count // size)
        raise


def _announce(source: Any, epoch: int) -> None:
    # PyTorch's and Hugging Face's word for "shuffle differently from now on".
    if hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
