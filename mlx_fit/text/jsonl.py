"""Files of one row a line, memory-mapped and indexed: any size, any row at once.

Imports layer 2: text.rows.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fit.checks import path_of
from mlx_fit.errors import DataError
from mlx_fit.text.rows import Place, Rows

__all__ = ["JsonLines", "LineFile", "TextLines"]

_CHUNK = 1 << 24  # bytes looked at together: small enough to stay near the cache
_ARRAY = " For a file that is one JSON array, pass json.load(open(path)) instead."
_BOM = b"\xef\xbb\xbf"


class LineFile:
    """The lines of a file, by number.

    The index holds 8 bytes for each line that is not blank, and the same again for its number where
    there are blank ones.

    Args:
        path: the file.

    Attributes:
        path: as given.
        numbers: 1-based line numbers of the lines that are not blank.
        num_blank: lines of nothing but whitespace.

    Raises:
        DataError: it is no file that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path_of("path", path)
        self._map = _mapped(self.path)
        ends = _newlines(self._map)
        size = len(self._map)
        if size and (not len(ends) or ends[-1] != size - 1):
            ends = np.append(ends, size)  # the last line has no newline
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1]) if len(ends) else ends
        if self._map[:3] == _BOM:
            starts[0] = 3
        kept = ~self._blank(starts, ends)
        self.num_blank = int(len(kept) - kept.sum())
        # Without blank lines the numbers are a range, and cost nothing.
        self.numbers: Any = np.flatnonzero(kept) + 1 if self.num_blank else range(1, len(kept) + 1)
        self._starts = starts[kept] if self.num_blank else starts
        self._ends = ends[kept] if self.num_blank else ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        """Line ``index`` of those that are not blank, without its newline."""
        return self._map[int(self._starts[index]) : int(self._ends[index])]

    def digest(self) -> str:
        """A hash of the file's bytes."""
        from hashlib import blake2b  # slow to import: it loads OpenSSL

        state = blake2b(digest_size=16)
        for start in range(0, len(self._map), _CHUNK):
            state.update(self._map[start : start + _CHUNK])
        return state.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return LineFile, (self.path,)  # a mapping cannot be pickled; a worker maps the file anew

    def _blank(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        blank = starts >= ends
        if not len(self._map):
            return blank
        data = np.frombuffer(self._map, np.uint8)
        first = data[np.minimum(starts, len(data) - 1)]
        # Hardly a line of data begins with whitespace, so only those are looked at whole.
        for line in np.flatnonzero(~blank & (first <= 32)):
            blank[line] = not self._map[int(starts[line]) : int(ends[line])].strip()
        return blank


def _mapped(path: Path) -> Any:
    """The file's bytes, not read yet."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return b""  # an empty file cannot be mapped
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", path=path) from error
    if mapping[:2] == b"\x1f\x8b":
        raise DataError("is compressed with gzip; unpack it first (gunzip).", path=path)
    return mapping


def _newlines(data: Any) -> np.ndarray:
    """Positions of the newlines, int64."""
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(data), _CHUNK):
        count = min(_CHUNK, len(data) - start)
        chunk = np.frombuffer(data, np.uint8, count, start)
        found.append(np.flatnonzero(chunk == 10) + start)
    return np.concatenate(found)


def _decoded(line: bytes, place: Place) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        byte = line[error.start]
        raise place.error(f"byte 0x{byte:02x} is not UTF-8.", column=column) from error


class _LineRows(Rows):
    """What both kinds of files share: places, and a parser of lines."""

    def __init__(self, path: str | Path) -> None:
        self.unit = "line"
        self.name = str(path)
        self._lines = LineFile(path)
        self.num_blank = self._lines.num_blank

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> Place:
        return Place(index, self.name, int(self._lines.numbers[index]))

    def digest(self) -> str:
        return self._lines.digest()


class JsonLines(_LineRows):
    """The rows of a JSONL file: one JSON object a line, in UTF-8; blank lines are no rows.

    The file is memory-mapped and indexed by its newlines, so that it may be larger than memory, and
    any row can be read at once. A byte order mark, carriage returns and a missing last newline are
    fine.

    Args:
        path: the file.

    Raises:
        DataError: the file cannot be read. A line that is no JSON object raises when it is asked
            for, with ``path``, ``line``, ``column`` (in characters, 1-based) and ``index``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = path.write_text('{"text": "one"}\\n\\n{"text": "two"}\\n')
        >>> rows = JsonLines(path)
        >>> len(rows), rows[1], rows.place(1).line
        (2, {'text': 'two'}, 3)
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # counts negative indices, raises IndexError
        place = self.place(index)
        text = _decoded(self._lines[index], place)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise place.error(_bad_json(text, error), column=error.colno) from error
        except (ValueError, RecursionError) as error:  # a number too long, or nested too deep
            raise place.error(f"is JSON that cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise place.error(
                f"found {_json_type(row)}; expected a JSON object with named fields, one a line."
                + (_ARRAY if isinstance(row, list) else "")
            )
        return row


def _bad_json(text: str, error: json.JSONDecodeError) -> str:
    start = max(error.pos - 20, 0)
    excerpt = text[start : error.pos + 20]
    message = f"{error.msg}, near {excerpt!r}. Each line must be one whole JSON object."
    if text.lstrip().startswith("["):
        message += _ARRAY
    return message


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class TextLines(_LineRows):
    """The lines of a text file in UTF-8, each a document; blank lines are none."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = _decoded(self._lines[index], self.place(index))
        return {"text": text.removesuffix("\r")}
