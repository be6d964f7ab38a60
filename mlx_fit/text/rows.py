"""Rows of text data, each with its place in what it was read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from mlx_fit.errors import DataError

__all__ = ["Place", "RowList", "Rows"]


class Place(NamedTuple):
    """Where a row comes from.

    Attributes:
        row: its number, counted from 0, without blank lines.
        path: its file, None for rows in memory.
        line: its line in the file, 1-based, blank lines included.
    """

    row: int
    path: str | None = None
    line: int | None = None

    @property
    def number(self) -> int:
        """What a user calls the row: its line, or its index where there is no file."""
        return self.row if self.line is None else self.line

    @property
    def name(self) -> str:
        """The row in words, for messages about data that came from elsewhere."""
        return f"row {self.row}" if self.line is None else f"{self.path}, line {self.line}"

    def error(self, message: str, *, field: str | None = None, column: int = 1) -> DataError:
        """The error for this row: ``path:line:column: message``, or ``row N: message``."""
        if self.line is None:
            return DataError(f"row {self.row}: {message}", field=field, index=self.row)
        return DataError(
            message, path=self.path, line=self.line, column=column, field=field, index=self.row
        )


class Rows(ABC):
    """Rows that can be asked for one by one.

    Attributes:
        name: what to call them in messages.
        unit: ``"line"`` or ``"row"``: what :attr:`Place.number` counts.
        num_blank: blank lines, which are no rows.
    """

    name: str
    unit: str
    num_blank: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Row ``index``. Raises DataError if it cannot be read."""

    @abstractmethod
    def place(self, index: int) -> Place:
        """Where row ``index`` is."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of the rows' content."""


class RowList(Rows):
    """Rows of a list or a data set: dicts, or strings, which are plain text."""

    def __init__(self, rows: Any) -> None:
        self.name = "the rows"
        self.unit = "row"
        self.num_blank = 0
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        row = self._rows[index]
        return {"text": row} if isinstance(row, str) else row

    def place(self, index: int) -> Place:
        return Place(index)

    def digest(self) -> str:
        import json
        from hashlib import blake2b  # slow to import: it loads OpenSSL

        state = blake2b(digest_size=16)
        for row in self._rows:
            state.update(json.dumps(row, default=repr).encode("utf-8", "surrogatepass") + b"\n")
        return state.hexdigest()
