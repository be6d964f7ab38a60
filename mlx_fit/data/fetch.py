"""One batch from a dataset and its indices.

Imports layer 2: data.arrays, data.collate, data.dataset, data.table,
data.table_target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlx_fit.data.arrays import batch_dtype, flatten, skeleton, to_numpy, unflatten
from mlx_fit.data.collate import collate
from mlx_fit.data.dataset import ArrayDataset, ConcatDataset, Subset
from mlx_fit.data.table import TableDataset
from mlx_fit.data.table_target import TargetRows
from mlx_fit.errors import DataError

__all__ = ["Check", "Indices", "add_position", "describe_rows", "fetcher", "stream_fetcher"]

Indices = Sequence[int] | np.ndarray
Collate = Callable[[list[Any], Indices], Any]
Check = Callable[[Any], None]


def _collator(collate_fn: Callable[[list[Any]], Any] | None, check: Check | None) -> Collate:
    """The user's ``collate_fn``, or ours, as a function of rows and their indices."""
    if collate_fn is None:
        return collate
    return lambda samples, indices: _checked(collate_fn(samples), check)


def _checked(value: Any, check: Check | None) -> Any:
    if check is not None:
        check(value)
    return value


def fetcher(
    dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, check: Check | None = None
) -> Callable[[Indices, int, int], Any]:
    """The fastest ``fetch(indices, epoch, batch)`` that ``dataset`` allows, whole batches first.

    A dataset's ``__getitems__(indices)`` may return a list of rows, which are collated (PyTorch's
    and Hugging Face's meaning), or arrays, which are the batch. A ``collate_fn`` always gets the
    rows of our own datasets one by one. ``check`` is called with all that the user's code returns.
    """
    if isinstance(dataset, ArrayDataset) and collate_fn is None:
        return partial(_fetch_arrays, dataset)
    if isinstance(dataset, TableDataset | TargetRows) and collate_fn is not None:
        return partial(_fetch_whole, dataset.rows, collate_fn, check)
    own = isinstance(dataset, ArrayDataset | Subset | ConcatDataset)
    is_slow = isinstance(dataset, ConcatDataset) and not dataset.gives_batches
    if hasattr(dataset, "__getitems__") and not (own and collate_fn is not None) and not is_slow:
        return partial(_fetch_whole, dataset.__getitems__, collate_fn, check)
    return partial(_fetch_rows, dataset, _collator(collate_fn, check), check)


def stream_fetcher(
    batch_size: int, collate_fn: Callable[[list[Any]], Any] | None, check: Check | None = None
) -> Callable[[list[Any], int, int], Any]:
    """A ``fetch(rows, epoch, batch)`` for rows that a stream has already given."""
    return partial(_collate_stream, batch_size, _collator(collate_fn, check), check)


def add_position(error: Exception, samples: str, epoch: int, batch: int) -> None:
    """Note on ``error`` which samples were being read when it was raised.

    Raises:
        RuntimeError: it is a StopIteration, which cannot leave an iterator as an error.
    """
    note = f"While reading {samples} (epoch {epoch}, batch {batch}, counted from 0)."
    if isinstance(error, StopIteration):
        stopped = RuntimeError("The dataset or collate_fn raised StopIteration.")
        stopped.add_note(note)
        raise stopped from error
    error.add_note(note)


def _fetch_arrays(dataset: ArrayDataset, indices: Indices, epoch: int, batch: int) -> Any:
    try:
        return dataset.__getitems__(indices)
    except Exception as error:
        add_position(error, describe_rows(indices), epoch, batch)
        raise


def _fetch_rows(
    dataset: Any,
    collate_rows: Collate,
    check: Check | None,
    indices: Indices,
    epoch: int,
    batch: int,
) -> Any:
    samples: list[Any] = []
    wanted = _as_list(indices)
    try:
        for index in wanted:
            sample = dataset[index]
            if check is not None:
                check(sample)
            samples.append(sample)
        return collate_rows(samples, wanted)
    except Exception as error:
        failed = wanted[len(samples) : len(samples) + 1]
        where = f"sample {failed[0]}" if failed else describe_rows(wanted)
        add_position(error, where, epoch, batch)
        raise


def _collate_stream(
    batch_size: int,
    collate_rows: Collate,
    check: Check | None,
    rows: list[Any],
    epoch: int,
    batch: int,
) -> Any:
    indices = range(batch * batch_size, batch * batch_size + len(rows))
    try:
        _checked(rows, check)
        return collate_rows(rows, indices)
    except Exception as error:
        add_position(error, describe_rows(indices), epoch, batch)
        raise


def _fetch_whole(
    get_rows: Callable[[list[int]], Any],
    collate_fn: Callable[[list[Any]], Any] | None,
    check: Check | None,
    indices: Indices,
    epoch: int,
    batch: int,
) -> Any:
    wanted = _as_list(indices)
    try:
        rows = _checked(get_rows(wanted), check)
        if isinstance(rows, list):
            _check_length(len(rows), wanted, "")
            return _collator(collate_fn, check)(rows, wanted)
        if collate_fn is None:
            return _as_batch(rows, wanted)
        return _checked(collate_fn(rows), check)
    except Exception as error:
        add_position(error, describe_rows(wanted), epoch, batch)
        raise


def _as_batch(rows: Any, wanted: list[int]) -> Any:
    leaves: list[Any] = []
    for path, leaf in flatten(rows):
        array = to_numpy(leaf)
        _check_length(len(array) if array.ndim else 0, wanted, path)
        dtype = batch_dtype(array.dtype)
        leaves.append(array.tolist() if dtype is None else array.astype(dtype, copy=False))
    return unflatten(skeleton(rows), iter(leaves))


def _check_length(num_rows: int, wanted: list[int], path: str) -> None:
    if num_rows != len(wanted):
        raise DataError(
            f"__getitems__ of the dataset returned {num_rows} rows{path and f' of {path}'} for "
            f"{len(wanted)} indices; it must return one row for each index.",
            field=path or None,
        )


def _as_list(indices: Indices) -> list[int]:
    return indices.tolist() if isinstance(indices, np.ndarray) else list(indices)


def describe_rows(indices: Indices) -> str:
    """The indices of a batch for a message, shortened if they are many."""
    listed = _as_list(indices)
    return f"samples {listed[:8]!s:.100} ..." if len(listed) > 8 else f"samples {listed}"
