"""Columns of Arrow tables as NumPy arrays. pyarrow is imported where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_fit.errors import DataError

__all__ = ["column_values", "is_numeric", "leaf_type", "row_values"]


def is_numeric(kind: Any) -> bool:
    """Whether an Arrow type is a number, a boolean, or lists of these: what makes an array."""
    import pyarrow.types as types

    kind = leaf_type(kind)
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def leaf_type(kind: Any) -> Any:
    """The type of what lists, dictionaries and extension types hold."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif _is_list(kind) or pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def column_values(
    column: Any, name: str, indices: np.ndarray, missing: Mapping[str, float]
) -> np.ndarray:
    """The values of some rows of a column, of shape ``(rows, ...)``.

    Args:
        column: a pyarrow ``ChunkedArray`` of these rows.
        name: of the column, for messages and for ``missing``.
        indices: the numbers of the rows in the data set, for messages.
        missing: what a null of a column of numbers becomes, by name.

    Returns:
        An array of the column's dtype; float32 where ``missing`` has a float for integers. Columns
        of anything but numbers give an array of Python objects.

    Raises:
        DataError: a null that ``missing`` does not name, or lists of different lengths.
    """
    array = _plain(column)
    if is_numeric(array.type):
        return _numbers(array, name, indices, missing)
    values = np.empty(len(array), dtype=object)
    values[:] = array.to_pylist()
    return values


def row_values(
    column: Any, name: str, indices: np.ndarray, missing: Mapping[str, float]
) -> list[Any]:
    """The same as a list with each row's value; lists may differ in length."""
    array = _plain(column)
    if not (len(array) and is_numeric(array.type) and _is_list(array.type)):
        return list(column_values(array, name, indices, missing))
    if array.null_count:
        raise _null(array, name, indices)
    lengths = _lengths(array)
    values = _plain(array.flatten())
    if _is_list(values.type):
        ends = np.cumsum(lengths)
        parts = zip(ends - lengths, lengths, indices, strict=True)
        return [
            _numbers(values.slice(start, length), name, np.repeat(index, length), missing)
            for start, length, index in parts
        ]
    flat = _numbers(values, name, np.repeat(indices, lengths), missing)
    return np.split(flat, np.cumsum(lengths)[:-1])


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _plain(column: Any) -> Any:
    """One array, without the wraps of extension types and dictionaries."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # what combining gives for some types
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _numbers(
    array: Any, name: str, indices: np.ndarray, missing: Mapping[str, float]
) -> np.ndarray:
    if _is_list(array.type):
        return _lists(array, name, indices, missing)
    if name not in missing:
        if array.null_count:
            raise _null(array, name, indices)
        values = array.to_numpy(zero_copy_only=False)
        # What lies in Arrow's memory, or in a mapped file, cannot be written to.
        return values if values.flags.writeable else values.copy()
    import pyarrow as pa

    value = missing[name]
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    values = array.fill_null(pa.scalar(0).cast(array.type)).to_numpy(zero_copy_only=False)
    if isinstance(value, float) and values.dtype.kind != "f":
        values = values.astype(np.float32)  # for all batches, whether they have nulls or not
    return np.where(is_null, np.asarray(value).astype(values.dtype), values)


def _lists(array: Any, name: str, indices: np.ndarray, missing: Mapping[str, float]) -> np.ndarray:
    if array.null_count:
        raise _null(array, name, indices)
    lengths = _lengths(array)
    length = int(lengths[0]) if len(lengths) else 0
    if (lengths != length).any():
        other = int(np.flatnonzero(lengths != length)[0])
        raise DataError(
            f"Row {indices[other]}: field {name!r} has {lengths[other]} entries, but in row "
            f"{indices[0]} it has {length}. Rows of one batch must agree: make them equal, or pass "
            "a collate_fn that pads.",
            field=name,
            index=int(indices[other]),
        )
    inner = _numbers(_plain(array.flatten()), name, np.repeat(indices, length), missing)
    return inner.reshape(len(array), length, *inner.shape[1:])


def _lengths(array: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(array).to_numpy(zero_copy_only=False)


def _null(array: Any, name: str, indices: np.ndarray) -> DataError:
    position = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
    index = int(indices[position])
    return DataError(
        f"Row {index}: field {name!r} has a null; expected a value. Leave the row out, or say "
        f"what a null becomes: missing={{{name!r}: 0}} (numbers only).",
        field=name,
        index=index,
    )
