"""Arrow and Parquet tables as datasets. Imports layer 2: data.arrays, data.arrow_columns,
data.row_groups, data.table_target.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from mlx_fit.checks import natural
from mlx_fit.data.arrow_columns import column_values, is_numeric, leaf_type, row_values
from mlx_fit.data.row_groups import RowGroups
from mlx_fit.data.table_target import TargetRows
from mlx_fit.errors import ConfigurationError, DataError

__all__ = ["PlainRows", "TableDataset", "is_arrow_table", "open_table"]


_FEW_CHUNKS = 64  # below which pyarrow's own take is the faster way


class _Source(NamedTuple):
    """What a table was opened with, so that a worker process can open it again."""

    source: Any
    columns: list[str] | None
    missing: dict[str, float]
    num_kept: int


@overload
def open_table(
    source: Any,
    columns: Sequence[str] | None = None,
    *,
    missing: Mapping[str, float] | None = None,
    num_kept: int = 4,
) -> TableDataset: ...


@overload
def open_table(
    source: Any,
    columns: Sequence[str] | None = None,
    *,
    target: str | None,
    missing: Mapping[str, float] | None = None,
    num_kept: int = 4,
) -> TableDataset | TargetRows: ...


def open_table(
    source: Any,
    columns: Sequence[str] | None = None,
    *,
    target: str | None = None,
    missing: Mapping[str, float] | None = None,
    num_kept: int = 4,
) -> TableDataset | TargetRows:
    """The rows of Parquet or Arrow files, of any size, without reading them at once.

    Arrow files (IPC, as a file or a stream: what Hugging Face writes, and Feather) are
    memory-mapped; those written compressed are read into memory. Parquet is decoded by row groups
    when they are asked for, so visit its rows in their order, or shuffle with
    :class:`RowGroupSampler`, which decodes each group once an epoch. Needs pyarrow:
    ``pip install mlx-fit[arrow]``.

    Args:
        source: a path, a list of paths whose rows follow each other, or a ``pyarrow.Table``. A
            file's content decides what it is, not its name.
        columns: which to read, in this order. Default: all.
        target: the column that is ``y``. Then rows are ``(x, y)``: where one other column is read
            and holds lists of numbers, these are ``x``; otherwise the others, which must be
            numbers, are one float32 vector ``x`` of shape ``(columns,)``. Without it rows are dicts
            by column.
        missing: what a null becomes, by the name of a column of numbers. A float makes a column of
            integers float32. Without an entry a null there is an error.
        num_kept: row groups of Parquet that stay decoded.

    Raises:
        ConfigurationError: an argument that cannot work, or pyarrow is missing.
        DataError: a file cannot be read, is neither Parquet nor Arrow, or has other columns than
            the first one; ``path`` says which.

    Example:
        >>> import pathlib, tempfile
        >>> from pyarrow import parquet, table  # doctest: +SKIP
        >>> from mlx_fit.data import DataLoader, open_table
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.parquet"
        >>> rows = table({"x": [[1.0, 2.0], [3.0, 4.0]], "y": [0, 1]})  # doctest: +SKIP
        >>> parquet.write_table(rows, path)  # doctest: +SKIP
        >>> batch = next(iter(DataLoader(open_table(path), batch_size=2)))  # doctest: +SKIP
        >>> batch["x"].shape, batch["y"].tolist()  # doctest: +SKIP
        ((2, 2), [0, 1])
    """
    names = None if columns is None else _names(columns)
    if target is not None and not isinstance(target, str):
        raise ConfigurationError(f"target={target!r}; expected the name of a column, or None.")
    if names is not None and target is not None and target not in names:
        names.append(target)
    table = TableDataset(
        _Source(source, names, dict(missing or {}), natural("num_kept", num_kept, 1))
    )
    return table if target is None else table.with_target(target)


class TableDataset:
    """Rows of a table, as dicts by column; made by :func:`open_table`.

    Columns of numbers, and of lists of numbers of one length, are arrays in a batch, float64 as
    float32; other columns are lists of Python objects: strings, bytes, dicts, dates, None.

    Attributes:
        columns: their names. group_sizes: rows of each row group of Parquet (else one number), for
            :class:`RowGroupSampler`.
    """

    def __init__(self, source: _Source) -> None:
        _pyarrow()
        self._source = source
        self._rows = _open(source)
        available = list(self._rows.schema.names)
        self.columns = available if source.columns is None else source.columns
        unknown = [name for name in self.columns if name not in available]
        if len(set(available)) < len(available):
            raise DataError(f"The table has a column name twice: {', '.join(available)}.")
        if unknown:
            raise ConfigurationError(
                f"There is no column {unknown[0]!r}. The table has: {', '.join(available)}."
            )
        _check_missing(source.missing, self.columns, self._rows.schema)
        self.group_sizes: list[int] = list(self._rows.sizes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index``."""
        return self.rows([range(len(self))[operator.index(index)]])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The rows at ``indices``: arrays of shape ``(len(indices), ...)`` by column.

        Raises:
            DataError: lists of a column differ in length, or there is a null; ``field`` and
                ``index`` say where.
        """
        wanted, table = self.take(indices)
        missing = self._source.missing
        return {
            name: column_values(table.column(name), name, wanted, missing) for name in self.columns
        }

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The rows at ``indices`` one by one, whose lists may differ in length.

        This is what a ``collate_fn`` gets.
        """
        wanted, table = self.take(indices)
        missing = self._source.missing
        values = [row_values(table.column(name), name, wanted, missing) for name in self.columns]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)]

    def take(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Any]:
        """The numbers of the rows, none negative, and the rows as an Arrow table."""
        wanted = np.asarray(indices, dtype=np.int64)
        outside = (wanted < -len(self)) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"row {wanted[outside][0]} of a table of {len(self)} rows")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        return wanted, self._rows.take(wanted).select(self.columns)

    def with_target(self, target: str) -> TargetRows:
        """The same rows as ``(x, y)``; see :func:`open_table`."""
        if target not in self.columns:
            raise ConfigurationError(
                f"target={target!r} is no column. The table has: {', '.join(self.columns)}."
            )
        return TargetRows(self, target, self._rows.schema)

    def column(self, name: str) -> np.ndarray:
        """All values of a column, of shape ``(rows, ...)``: labels for a sampler, for example."""
        missing = {key: value for key, value in self._source.missing.items() if key == name}
        only = TableDataset(self._source._replace(columns=_names([name]), missing=missing))
        parts, start = [], 0
        for size in only.group_sizes:
            parts.append(only.__getitems__(np.arange(start, start + size))[name])
            start += size
        return np.concatenate(parts) if parts else np.zeros(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return TableDataset, (self._source,)


class PlainRows:
    """The rows of a table as Python objects, nulls as None: rows of text, for example."""

    def __init__(self, table: TableDataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, rows = self._table.take([range(len(self))[operator.index(index)]])
        return rows.to_pylist()[0]


def _num_chunks(table: Any) -> int:
    return max((column.num_chunks for column in table.columns), default=0)


class _WholeTable:
    """A table in memory, or in a memory-mapped file."""

    def __init__(self, table: Any) -> None:
        self.schema = table.schema
        self.sizes = [table.num_rows]
        self._table = table
        self._chunks = [] if _num_chunks(table) <= _FEW_CHUNKS else table.to_batches()
        self._ends = np.cumsum([chunk.num_rows for chunk in self._chunks], dtype=np.int64)

    def __len__(self) -> int:
        return self.sizes[0]

    def take(self, indices: np.ndarray) -> Any:
        """The rows at ``indices``, as an Arrow table in that order."""
        if len(indices) and (np.diff(indices) == 1).all():
            return self._table.slice(int(indices[0]), len(indices))
        if not self._chunks or not len(indices):
            return self._table.take(indices)
        import pyarrow as pa

        # pyarrow's take looks at every chunk; a file of Hugging Face has one for 1,000 rows.
        which = np.searchsorted(self._ends, indices, side="right")
        starts = indices - self._ends[which] + [self._chunks[chunk].num_rows for chunk in which]
        rows = [
            self._chunks[chunk].slice(start, 1)
            for chunk, start in zip(which.tolist(), starts.tolist(), strict=True)
        ]
        return pa.Table.from_batches(rows)


def is_arrow_table(data: object) -> bool:
    """Whether ``data`` is a ``pyarrow.Table``; pyarrow is not imported to tell."""
    kind = type(data)
    return kind.__name__ == "Table" and kind.__module__ == "pyarrow.lib"


def _open(source: _Source) -> RowGroups | _WholeTable:
    if is_arrow_table(source.source):
        return _WholeTable(source.source)
    paths = _paths(source.source)
    kinds = [_is_parquet(path) for path in paths]
    if all(kinds):
        return RowGroups(paths, source.columns, source.num_kept)
    if any(kinds):
        other = paths[kinds.index(False)]
        raise DataError("is no Parquet file, but others of the list are.", path=other)
    import pyarrow as pa

    tables = [_mapped_table(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if not table.schema.equals(tables[0].schema):
            raise DataError(
                f"its columns differ from those of {paths[0]}; files of one table need the same: "
                f"found {_described(table.schema)}, expected {_described(tables[0].schema)}.",
                path=path,
            )
    return _WholeTable(pa.concat_tables(tables))


def _paths(source: Any) -> list[Path]:
    if isinstance(source, str | os.PathLike):
        return [Path(source)]
    is_list = isinstance(source, list | tuple) and source
    if is_list and all(isinstance(path, str | os.PathLike) for path in source):
        return [Path(path) for path in source]
    raise ConfigurationError(
        f"source is a {type(source).__name__}; expected a path, a list of paths or a pyarrow.Table."
    )


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError as error:
        raise DataError(f"cannot be read: {error}", path=path) from error


def _mapped_table(path: Path) -> Any:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                return pa.ipc.open_file(file).read_all()
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read as a table: {error} Expected a Parquet or an Arrow file.", path=path
        ) from error


def _names(columns: Any) -> list[str]:
    is_list = isinstance(columns, list | tuple) and columns
    if not is_list or not all(isinstance(name, str) for name in columns):
        raise ConfigurationError(f"columns={columns!r}; expected a list of names.")
    if len(set(columns)) < len(columns):
        raise ConfigurationError(f"columns={columns!r} has a name twice.")
    return list(columns)


def _check_missing(missing: dict[str, float], columns: list[str], schema: Any) -> None:
    for name, value in missing.items():
        if name not in columns or not is_numeric(schema.field(name).type):
            raise ConfigurationError(
                f"missing has {name!r}, which is no column of numbers that is read: "
                f"{', '.join(columns)}."
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"missing[{name!r}]={value!r}; expected a number.")
        dtype = np.dtype(leaf_type(schema.field(name).type).to_pandas_dtype())
        if isinstance(value, int) and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if not limits.min <= value <= limits.max:
                raise ConfigurationError(f"missing[{name!r}]={value}, which {dtype} cannot hold.")


def _described(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigurationError("open_table needs pyarrow: pip install mlx-fit[arrow].") from error
    return pyarrow
