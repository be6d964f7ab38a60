"""CSV files as columns of arrays. Imports layer 2: data.dataset."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_fit.checks import path_of
from mlx_fit.data.dataset import ArrayDataset
from mlx_fit.errors import ConfigurationError, DataError

__all__ = ["read_csv"]

_LARGEST_INT = 2**63 - 1
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


class _Record(NamedTuple):
    """A row of the file and the line it begins at, 1-based."""

    line: int
    fields: list[str]


def read_csv(
    path: str | Path,
    target: str | None = None,
    *,
    columns: Sequence[str] | None = None,
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    missing: float | None = None,
) -> ArrayDataset:
    """The rows of a CSV file (RFC 4180, UTF-8; ``.gz`` is decompressed), read into memory.

    A column is int64 if all of its fields are whole numbers, float32 if all are numbers, and
    strings, as Python lists in batches, if its first field is no number. Whitespace around numbers
    and blank lines do not matter.

    Args:
        path: the file.
        target: the column that is ``y``. Then rows are ``(x, y)``, with the other columns, which
            must be numbers, as one float32 vector ``x`` of shape ``(columns,)``. Without it rows
            are dicts by column.
        columns: which to read, in this order. Default: all, ``target`` apart.
        delimiter: one character.
        names: of the columns, for a file whose first line is data. Default: the first line.
        missing: what an empty field of a column of numbers becomes, such as ``float("nan")``.
            Default: an empty field there is an error.

    Raises:
        ConfigurationError: arguments that cannot work, or a column that the file has not.
        DataError: a field that does not fit, a row of another length, bad quotes or bytes. It has
            ``path``, ``line`` (where the row begins), ``column`` (the number of the field in its
            row, 1-based), ``field`` (its name) and ``index`` (of the row).

    Example:
        >>> import pathlib, tempfile
        >>> from mlx_fit.data import DataLoader, read_csv
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "houses.csv"
        >>> _ = path.write_text("rooms,area,price\\n3,70.5,210\\n2,48,150\\n")
        >>> x, y = next(iter(DataLoader(read_csv(path, target="price"), batch_size=2)))
        >>> x.tolist(), y.tolist()
        ([[3.0, 70.5], [2.0, 48.0]], [210, 150])
    """
    path = path_of("path", path)
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise ConfigurationError(f"delimiter={delimiter!r}; expected one character.")
    if isinstance(names, str):
        raise ConfigurationError(f"names={names!r}; expected a list of names.")
    if missing is not None and (isinstance(missing, bool) or not isinstance(missing, int | float)):
        raise ConfigurationError(f"missing={missing!r}; expected a number or None.")
    records = _records(path, delimiter)
    first = _header(path, records) if names is None else _Record(1, list(names))
    _check_names(first, path)
    header = first.fields
    chosen = _chosen(header, columns, target)
    rows = list(_checked(records, header, path))
    if not rows:
        raise DataError("holds no row of data.", path=path)
    arrays = {name: _column(rows, header.index(name), name, missing, path) for name in chosen}
    if target is None:
        return ArrayDataset(arrays)
    y = arrays.pop(target)
    for name, array in arrays.items():
        if array.dtype.kind not in "fi":
            raise DataError(
                f"column {name!r} holds text ({array[0]!r}), but x is made of numbers. Leave it "
                "out of columns, or read the file without target.",
                path=path,
                line=rows[0].line,
                column=header.index(name) + 1,
                field=name,
                index=0,
            )
    return ArrayDataset((np.stack(list(arrays.values()), axis=1).astype(np.float32), y))


def _lines(path: Path, delimiter: str) -> Iterator[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                start = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                try:
                    yield line[start:].decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    column = error.object[: error.start].count(delimiter.encode()) + 1
                    raise DataError(
                        f"byte 0x{byte:02x} is not UTF-8.", path=path, line=number, column=column
                    ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path) from error


def _records(path: Path, delimiter: str) -> Iterator[_Record]:
    """The rows of the file, the header included, without blank lines."""
    reader = csv.reader(_lines(path, delimiter), delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield _Record(line, fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"bad quotes or characters in the row that begins here: {error}.", path=path, line=line
        ) from error


def _header(path: Path, records: Iterator[_Record]) -> _Record:
    first = next(records, None)
    if first is None:
        raise DataError("is empty; expected a line with the names of the columns.", path=path)
    return _Record(first.line, [name.strip() for name in first.fields])


def _check_names(first: _Record, path: Path) -> None:
    names = first.fields
    for column, name in enumerate(names, 1):
        if not isinstance(name, str) or not name or names.index(name) + 1 != column:
            kind = "comes twice" if name in names[: column - 1] else "is no name"
            raise DataError(
                f"column {column} is called {name!r}, which {kind}. Each column needs a name of "
                "its own: give names=[...] if the first line is data.",
                path=path,
                line=first.line,
                column=column,
            )


def _chosen(header: list[str], columns: Sequence[str] | None, target: str | None) -> list[str]:
    if isinstance(columns, str):
        raise ConfigurationError(f"columns={columns!r}; expected a list of names.")
    chosen = [n for n in header if n != target] if columns is None else list(columns)
    if target is not None:
        if target in chosen:
            raise ConfigurationError(f"target {target!r} is also in columns; it can be x or y.")
        chosen.append(target)
    unknown = [name for name in chosen if name not in header]
    if unknown or len(set(chosen)) < len(chosen):
        what = f"no column {unknown[0]!r}" if unknown else "a column twice in columns"
        raise ConfigurationError(f"There is {what}. The file has: {', '.join(header)}.")
    if len(chosen) == (target is not None):
        raise ConfigurationError("columns leaves no column to read.")
    return chosen


def _checked(records: Iterable[_Record], header: list[str], path: Path) -> Iterator[_Record]:
    for index, record in enumerate(records):
        found = len(record.fields)
        if found != len(header):
            raise DataError(
                f"the row has {found} fields; expected {len(header)}: {', '.join(header)}.",
                path=path,
                line=record.line,
                column=min(found, len(header)) + 1,
                field=header[found] if found < len(header) else None,
                index=index,
            )
        yield record


def _column(
    rows: list[_Record], position: int, name: str, missing: float | None, path: Path
) -> np.ndarray:
    texts = [row.fields[position] for row in rows]
    first = next((text for text in texts if text.strip()), "")
    if _number(first) is None:
        return np.array(texts, dtype=object)
    values: list[Any] = []
    for index, text in enumerate(texts):
        is_empty = not text.strip()
        value = missing if is_empty else _number(text)
        is_too_large = value is not None and _LARGEST_FLOAT < abs(value) < math.inf
        if value is None or is_too_large:
            what = "is empty" if is_empty else f"holds {text!r:.60}"
            hint = "give missing=, or fill it in" if is_empty else "the column began with numbers"
            hint = "float32 ends at 3.4e38" if is_too_large else hint
            raise DataError(
                f"field {name!r} {what}; expected a number ({hint}).",
                path=path,
                line=rows[index].line,
                column=position + 1,
                field=name,
                index=index,
            )
        values.append(value)
    is_whole = all(isinstance(value, int) for value in values)
    return np.array(values, np.int64 if is_whole else np.float32)


def _number(text: str) -> int | float | None:
    """The number that ``text`` is, whole ones within 64 bits as an int; None if it is none."""
    if "_" in text:  # which Python reads as a number
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    try:
        whole = int(text)
    except ValueError:  # a fraction, or thousands of digits
        return number
    return whole if abs(whole) <= _LARGEST_INT else number
