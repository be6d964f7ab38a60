"""One batch from a dataset and its indices.

Imports layer 2: data.arrays, data.collate, data.dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlx_fit.data.arrays import batch_dtype, flatten, skeleton, to_numpy, unflatten
from mlx_fit.data.collate import collate
from mlx_fit.data.dataset import ArrayDataset, Subset
from mlx_fit.errors import DataError

__all__ = ["Indices", "add_position", "fetcher", "stream_fetcher"]

Indices = Sequence[int] | np.ndarray
Collate = Callable[[list[Any], Indices], Any]


def _collator(collate_fn: Callable[[list[Any]], Any] | None) -> Collate:
    """The user's ``collate_fn``, or ours, as a function of rows and their indices."""
    if collate_fn is None:
        return collate
    return lambda samples, indices: collate_fn(samples)


def fetcher(
    dataset: Any, collate_fn: Callable[[list[Any]], Any] | None
) -> Callable[[Indices, int, int], Any]:
    """The fastest ``fetch(indices, epoch, batch)`` that ``dataset`` allows, whole batches first.

    A dataset's ``__getitems__(indices)`` may return a list of rows, which are collated (PyTorch's
    and Hugging Face's meaning), or arrays, which are the batch. A ``collate_fn`` always gets the
    rows of our own datasets one by one.
    """
    if isinstance(dataset, ArrayDataset) and collate_fn is None:
        return partial(_fetch_arrays, dataset)
    own = isinstance(dataset, ArrayDataset | Subset)
    if hasattr(dataset, "__getitems__") and not (own and collate_fn is not None):
        return partial(_fetch_whole, dataset, collate_fn)
    return partial(_fetch_rows, dataset, _collator(collate_fn))


def stream_fetcher(
    batch_size: int, collate_fn: Callable[[list[Any]], Any] | None
) -> Callable[[list[Any], int, int], Any]:
    """A ``fetch(rows, epoch, batch)`` for rows that a stream has already given."""
    return partial(_collate_stream, batch_size, _collator(collate_fn))


def add_position(error: Exception, samples: str, epoch: int, batch: int) -> None:
    """Note on ``error`` which samples were being read when it was raised."""
    error.add_note(f"While reading {samples} (epoch {epoch}, batch {batch}, counted from 0).")


def _fetch_arrays(dataset: ArrayDataset, indices: Indices, epoch: int, batch: int) -> Any:
    try:
        return dataset.__getitems__(indices)
    except Exception as error:
        add_position(error, f"samples {_listed(indices)}", epoch, batch)
        raise


def _fetch_rows(
    dataset: Any, collate_rows: Collate, indices: Indices, epoch: int, batch: int
) -> Any:
    samples: list[Any] = []
    wanted = _as_list(indices)
    try:
        for index in wanted:
            samples.append(dataset[index])
        return collate_rows(samples, wanted)
    except Exception as error:
        failed = wanted[len(samples) : len(samples) + 1]
        where = f"sample {failed[0]}" if failed else f"samples {_listed(wanted)}"
        add_position(error, where, epoch, batch)
        raise


def _collate_stream(
    batch_size: int, collate_rows: Collate, rows: list[Any], epoch: int, batch: int
) -> Any:
    indices = range(batch * batch_size, batch * batch_size + len(rows))
    try:
        return collate_rows(rows, indices)
    except Exception as error:
        add_position(error, f"samples {_listed(indices)}", epoch, batch)
        raise


def _fetch_whole(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
    indices: Indices,
    epoch: int,
    batch: int,
) -> Any:
    wanted = _as_list(indices)
    try:
        rows = dataset.__getitems__(wanted)
        if isinstance(rows, list):
            _check_length(len(rows), wanted, "")
            return _collator(collate_fn)(rows, wanted)
        return _as_batch(rows, wanted) if collate_fn is None else collate_fn(rows)
    except Exception as error:
        add_position(error, f"samples {_listed(wanted)}", epoch, batch)
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


def _listed(indices: Indices) -> str:
    listed = _as_list(indices)
    return f"{listed[:8]!s:.100} ..." if len(listed) > 8 else str(listed)
