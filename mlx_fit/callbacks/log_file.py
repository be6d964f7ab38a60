"""A file of rows that a callback writes while a run goes on, and keeps whole."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_fit.callbacks.base import Callback


class LogFile(Callback, ABC):
    """Rows that are kept, and written as they come.

    A row that cannot be written, on a full disk perhaps, is no reason to lose the run: a warning
    says so once, and the next row is written with all that are missing.

    Args:
        path: the file.
    """

    first_rank_only = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_behind = False

    @abstractmethod
    def _write_all(self, file: Any) -> None:
        """Write every row into an open text file."""

    def _rewrite(self) -> None:
        """Put a new file in the place of the old one, if there is one, with every row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(f".tmp-{self.path.name}")
        try:
            with staged.open("w", encoding="utf-8", newline="") as file:
                self._write_all(file)
            staged.replace(self.path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        self._is_behind = False

    def _add(self, write: Callable[[Any], Any] | None) -> None:
        """Add the newest row to the file.

        Args:
            write: writes it into an open text file; None: the file has to be written anew.
        """
        try:
            if self._is_behind or write is None:
                self._rewrite()
            else:
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    write(file)
        except OSError as error:
            if not self._is_behind:
                warnings.warn(
                    f"{type(self).__name__}: {self.path} cannot be written: {error}. Training goes "
                    "on, and the next row will be written with all that are missing.",
                    stacklevel=3,
                )
            self._is_behind = True
