"""Row groups of Parquet files, decoded when they are asked for; the last few are kept.

pyarrow is imported where it is used.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_fit.errors import DataError

__all__ = ["RowGroups"]


class _Group(NamedTuple):
    """Where a row group is: its file, the file's metadata, and its number there."""

    path: Path
    metadata: Any
    number: int


class RowGroups:
    """The rows of Parquet files, by number over all of them.

    Args:
        paths: the files.
        columns: which to decode; None for all.
        num_kept: decoded groups that are kept, the last ones used.

    Attributes:
        schema: Arrow's, of the decoded columns. sizes: rows of each group.
        num_decoded: groups decoded so far, for tests and for tuning.

    Raises:
        DataError: a file cannot be read, or its columns differ from those of the first one.
    """

    def __init__(self, paths: list[Path], columns: list[str] | None, num_kept: int) -> None:
        self.columns = columns
        self.num_decoded = 0
        self.sizes: list[int] = []
        self.schema: Any = None
        self._groups: list[_Group] = []
        self._num_kept = num_kept
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()  # a loader reads in its thread, users in theirs
        self._has_warned = False
        for path in paths:
            self._add(path)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)

    def __len__(self) -> int:
        return sum(self.sizes)

    def take(self, indices: np.ndarray) -> Any:
        """The rows at ``indices`` (int64, within range), as an Arrow table in that order."""
        import pyarrow as pa

        if not len(indices):
            return self.schema.empty_table()
        group_of = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - self.sizes
        wanted = np.unique(group_of).tolist()
        self._warn_of_decoding(len(wanted))
        with self._lock:
            # Those that are there first, before others push them out.
            wanted.sort(key=lambda number: number not in self._kept)
            tables, places = [], []
            for number in wanted:
                rows = np.flatnonzero(group_of == number)
                tables.append(self._group(number).take(indices[rows] - starts[number]))
                places.append(rows)
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(tables).take(np.argsort(np.concatenate(places)))

    def _add(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(path, memory_map=True) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot be read as Parquet: {error}", path=path) from error
        self.schema = self.schema or schema
        for field in self.schema:
            if self.columns is not None and field.name not in self.columns:
                continue
            found = schema.field(field.name).type if field.name in schema.names else None
            if found != field.type:
                raise DataError(
                    f"column {field.name!r} is {found or 'missing'} here, but {field.type} in "
                    f"{self._groups[0].path if self._groups else 'the first file'}; files of one "
                    "table need the same columns.",
                    path=path,
                    field=field.name,
                )
        for number in range(metadata.num_row_groups):
            self._groups.append(_Group(path, metadata, number))
            self.sizes.append(metadata.row_group(number).num_rows)

    def _group(self, number: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        group = self._groups[number]
        names = self.columns or self.schema.names
        try:
            with parquet.ParquetFile(group.path, metadata=group.metadata, memory_map=True) as file:
                table = file.read_row_group(group.number, columns=names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"row group {group.number} cannot be read: {error}", path=group.path
            ) from error
        self.num_decoded += 1
        self._kept[number] = table
        while len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)
        return table

    def _warn_of_decoding(self, num_wanted: int) -> None:
        # Twice as many are normal where a batch ends one stretch of groups and begins another.
        if num_wanted > 2 * self._num_kept and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"A batch has rows of {num_wanted} of the {len(self._groups)} row groups, and "
                f"{self._num_kept} are kept decoded, so each batch decodes most of them again. "
                "Shuffle with sampler=RowGroupSampler(table.group_sizes), raise num_kept, or "
                "write the table as an Arrow file, which is memory-mapped.",
                stacklevel=2,
            )
