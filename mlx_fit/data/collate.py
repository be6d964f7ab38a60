"""Rows to a batch. Imports layer 2: data.arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_fit.data.arrays import batch_dtype, is_array, is_named_tuple, is_scalar, to_numpy
from mlx_fit.errors import DataError

__all__ = ["collate"]

_NUMBERS = {bool, int, float}


def collate(samples: Sequence[Any], indices: Sequence[int] | np.ndarray | None = None) -> Any:
    """Stack rows to a batch of the same structure, of shape ``(len(samples), ...)``.

    Rows are numbers, arrays (NumPy, MLX, PyTorch, anything with ``__array__``), lists of numbers,
    or dicts, tuples, NamedTuples and lists of these. float64 becomes float32; other dtypes stay,
    and Python's integers are int64 (as in PyTorch). Strings give a Python list.

    Args:
        samples: at least one row.
        indices: where each row stands in the data set, for messages. Default: in the batch.

    Raises:
        DataError: rows differ in shape, keys or structure, or hold something that is no array;
            ``field`` and ``index`` say where.

    Example:
        >>> from mlx_fit.data.collate import collate
        >>> batch = collate([{"x": [0.5, 1.0], "id": "a"}, {"x": [2.0, 3.0], "id": "b"}])
        >>> batch["x"].shape, batch["x"].dtype, batch["id"]
        ((2, 2), dtype('float32'), ['a', 'b'])
    """
    return _stack(samples, range(len(samples)) if indices is None else indices, "")


def _stack(values: Sequence[Any], indices: Sequence[int] | np.ndarray, path: str) -> Any:
    first = values[0]
    if isinstance(first, str | bytes):
        return _strings(values, indices, path)
    if is_scalar(first) or is_array(first):
        return _arrays(values, indices, path)
    if isinstance(first, dict):
        _check_keys(values, indices, path)
        return {
            key: _stack([value[key] for value in values], indices, _join(path, key))
            for key in first
        }
    if isinstance(first, tuple | list):
        _check_lengths(values, indices, path)
        names = first._fields if is_named_tuple(first) else range(len(first))  # type: ignore[union-attr]
        columns = zip(*values, strict=True)
        parts = [
            _stack(column, indices, _join(path, name))
            for name, column in zip(names, columns, strict=True)
        ]
        if is_named_tuple(first):
            return type(first)(*parts)
        return tuple(parts) if isinstance(first, tuple) else parts
    raise _unknown(first, indices[0], path)


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _field(path: str) -> str:
    return f"field {path!r}" if path else "the row"


def _strings(values: Sequence[Any], indices: Sequence[int] | np.ndarray, path: str) -> list[Any]:
    for value, index in zip(values, indices, strict=True):
        if not isinstance(value, str | bytes):
            raise _differs(path, index, _describe(value), indices[0], _describe(values[0]))
    return list(values)


def _arrays(values: Sequence[Any], indices: Sequence[int] | np.ndarray, path: str) -> np.ndarray:
    kinds = set(map(type, values))
    if kinds <= _NUMBERS or (len(kinds) == 1 and isinstance(values[0], np.generic)):
        batch = np.asarray(values)  # the common labels, faster than one array each
    else:
        batch = np.stack(_equal_arrays(values, indices, path))
    if batch.dtype.kind == "O":  # an integer beyond 64 bits
        raise _unknown(values[0], indices[0], path)
    return batch.astype(batch_dtype(batch.dtype), copy=False)


def _equal_arrays(
    values: Sequence[Any], indices: Sequence[int] | np.ndarray, path: str
) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for value, index in zip(values, indices, strict=True):
        if not (is_scalar(value) or is_array(value)):
            raise _differs(path, index, _describe(value), indices[0], _describe(values[0]))
        try:
            array = to_numpy(value)
        except ValueError as error:
            raise DataError(
                f"Row {index}: {_field(path)} cannot be made an array: {error}",
                field=path or None,
                index=int(index),
            ) from error
        if array.dtype.kind in "OSU":
            raise _unknown(value, index, path)
        if arrays and array.shape != arrays[0].shape:
            raise _differs(
                path, index, f"shape {array.shape}", indices[0], f"shape {arrays[0].shape}"
            )
        arrays.append(array)
    return arrays


def _check_keys(values: Sequence[Any], indices: Sequence[int] | np.ndarray, path: str) -> None:
    expected = values[0].keys()
    for value, index in zip(values, indices, strict=True):
        if not isinstance(value, dict) or value.keys() != expected:
            raise _differs(path, index, _describe(value), indices[0], _describe(values[0]))


def _check_lengths(values: Sequence[Any], indices: Sequence[int] | np.ndarray, path: str) -> None:
    expected = len(values[0])
    for value, index in zip(values, indices, strict=True):
        if not isinstance(value, tuple | list) or len(value) != expected:
            raise _differs(path, index, _describe(value), indices[0], _describe(values[0]))


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"the keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"{len(value)} entries"
    return "None" if value is None else f"a {type(value).__name__}"


def _differs(path: str, index: int, found: str, first_index: int, expected: str) -> DataError:
    return DataError(
        f"Row {index}: {_field(path)} has {found}, but in row {first_index} it has {expected}. "
        "Rows of one batch must agree: make them equal in the dataset, or pass a collate_fn that "
        "pads or sorts them out.",
        field=path or None,
        index=int(index),
    )


def _unknown(value: Any, index: int, path: str) -> DataError:
    return DataError(
        f"Row {index}: {_field(path)} is {_describe(value)} and cannot be stacked. Expected "
        "numbers, arrays, strings, or dicts, tuples and lists of these: convert it in the dataset, "
        "or pass a collate_fn.",
        field=path or None,
        index=int(index),
    )
