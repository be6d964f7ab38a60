"""Tokens of many documents, stored flat, in memory or in memory-mapped files."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fit.errors import ConfigurationError, DataError

__all__ = ["TokenStore", "TokenWriter", "load"]

_VERSION = 1
_FLUSH = 1 << 20  # tokens held before they are written
_DTYPES: dict[str, Any] = {
    "tokens": np.dtype("<i4"),
    "mask": np.dtype("u1"),
    "offsets": np.dtype("<i8"),
}
_DTYPES["numbers"] = np.dtype("<i8")


class TokenStore:
    """Documents as slices of flat arrays.

    Args:
        tokens: int32 of shape ``(total,)``. mask: uint8, the same, 1 at targets.
        offsets: int64 of shape ``(documents + 1,)``: document ``i`` is
            ``tokens[offsets[i]:offsets[i + 1]]``.
        numbers: int64 of shape ``(documents,)``: the line or row that each came from.
        facts: what was counted while reading, as JSON.
        folder: where the arrays are mapped from, None in memory.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        offsets: np.ndarray,
        numbers: np.ndarray,
        facts: dict[str, Any],
        folder: Path | None = None,
    ) -> None:
        self.tokens = tokens
        self.mask = mask
        self.offsets = offsets
        self.numbers = numbers
        self.facts = facts
        self._folder = folder

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.mask[part]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the files anew, where NumPy would send it a copy of them.
        if self._folder is not None:
            return load, (self._folder,)
        arrays = (self.tokens, self.mask, self.offsets, self.numbers)
        return TokenStore, (*arrays, self.facts)


def load(folder: Path) -> TokenStore | None:
    """The store in a folder, memory-mapped; None if there is none, or it is not whole."""
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        if facts["version"] != _VERSION:
            return None
        arrays = {}
        for name, count in facts["lengths"].items():
            path, dtype = folder / f"{name}.bin", _DTYPES[name]
            if path.stat().st_size != count * dtype.itemsize:
                return None
            # An empty file cannot be mapped. As plain arrays: indexing a np.memmap is slower.
            arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if count else np.zeros(0, dtype)
        return TokenStore(**arrays, facts=facts["facts"], folder=folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class TokenWriter:
    """Gathers documents in memory, or in files as they come.

    Args:
        folder: where the files go when all is done; None keeps them in memory. Until then they are
            in a folder beside it, so that what has the name is always whole.

    Raises:
        ConfigurationError: nothing can be written there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._staging: Path | None = None
        if folder is not None:
            import tempfile  # slow to import, and for caches alone

            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                self._staging = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
            except OSError as error:
                raise ConfigurationError(
                    f"cache_dir={str(folder.parent)!r} cannot be written: {error}"
                ) from error
        self._tokens = array("i")
        self._mask = bytearray()
        self._offsets = array("q", [0])
        self._numbers = array("q")
        self._num_flushed = 0

    def add(self, tokens: list[int], mask: list[int], number: int) -> None:
        """Add a document that came from line (or row) ``number``."""
        self._tokens.extend(tokens)
        self._mask.extend(mask)
        self._offsets.append(self._num_flushed + len(self._tokens))
        self._numbers.append(number)
        if self._staging is not None and len(self._tokens) >= _FLUSH:
            self._flush(self._staging)

    def finish(self, facts: dict[str, Any]) -> TokenStore:
        """All that was added, with ``facts``."""
        if self._staging is None or self._folder is None:
            arrays = (
                np.frombuffer(self._tokens, np.int32),
                np.frombuffer(self._mask, np.uint8),
                np.frombuffer(self._offsets, np.int64),
                np.frombuffer(self._numbers, np.int64),
            )
            for each in arrays:
                each.flags.writeable = False  # items are views: nobody may change them by accident
            return TokenStore(*arrays, facts)
        self._flush(self._staging)
        (self._staging / "offsets.bin").write_bytes(self._bytes(self._offsets, "offsets"))
        (self._staging / "numbers.bin").write_bytes(self._bytes(self._numbers, "numbers"))
        total = self._num_flushed
        lengths = {"tokens": total, "mask": total, "offsets": len(self._offsets)}
        lengths["numbers"] = len(self._numbers)
        whole = {"version": _VERSION, "lengths": lengths, "facts": facts}
        (self._staging / "facts.json").write_text(json.dumps(whole), "utf-8")
        store = load(self._folder)
        if store is not None:  # another process was faster, with the same content
            self.discard()
            return store
        shutil.rmtree(self._folder, ignore_errors=True)  # one that is not whole
        os.replace(self._staging, self._folder)
        store = load(self._folder)
        if store is None:
            raise DataError("was written as the cache of tokens, and changed.", path=self._folder)
        return store

    def discard(self) -> None:
        """Remove what was written."""
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _flush(self, staging: Path) -> None:
        with (staging / "tokens.bin").open("ab") as file:
            file.write(self._bytes(self._tokens, "tokens"))
        with (staging / "mask.bin").open("ab") as file:
            file.write(self._mask)
        self._num_flushed += len(self._tokens)
        self._tokens = array("i")
        self._mask = bytearray()

    @staticmethod
    def _bytes(values: array[int], name: str) -> bytes:
        return np.array(values, _DTYPES[name]).tobytes()
