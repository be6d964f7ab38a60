"""What a text data set is read from. Imports layer 2: data.table, text.jsonl, text.rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from mlx_fit.data.table import PlainRows, is_arrow_table, open_table
from mlx_fit.errors import ConfigurationError
from mlx_fit.text.jsonl import JsonLines, TextLines
from mlx_fit.text.rows import RowList, Rows

__all__ = ["open_rows"]


def open_rows(source: Any) -> Rows:
    """The rows of a path, or of rows in memory.

    Args:
        source: a path ending in ``.txt`` (a document a line), in ``.parquet`` or ``.arrow`` (a
            table), or any other (JSONL); a ``pyarrow.Table``; a list, a data set with ``__len__``
            and ``__getitem__``, or an iterable, of dicts or strings.

    Raises:
        DataError: the file cannot be read.
        ConfigurationError: ``source`` is something else.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(os.fspath(source))
        if "\n" in str(path):
            raise ConfigurationError(
                "source is a text of several lines; expected a path. For one document pass [text]."
            )
        if path.suffix in (".parquet", ".arrow"):
            return RowList(PlainRows(open_table(path)))
        return TextLines(path) if path.suffix == ".txt" else JsonLines(path)
    if is_arrow_table(source):
        return RowList(PlainRows(open_table(source)))
    if not isinstance(source, Mapping | bytes | Set):
        if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
            return RowList(source)
        if isinstance(source, Iterable):
            return RowList(list(source))
    raise ConfigurationError(
        f"source is a {type(source).__name__}; expected the path of a .jsonl, .txt or "
        ".parquet file, or a list of rows (dicts such as {'text': ...}, or strings), which have an "
        "order."
    )
