"""Rows ``(x, y)`` of a table, one of whose columns is the target. Imports layer 2:
data.arrow_columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_fit.data.arrow_columns import is_numeric, leaf_type
from mlx_fit.errors import ConfigurationError

__all__ = ["TargetRows"]


class TargetRows:
    """A table by rows and targets; made by ``open_table(..., target=...)``.

    Args:
        table: a :class:`~mlx_fit.data.TableDataset`, the target's column included.
        target: the column that is ``y``.
        schema: Arrow's types of its columns.

    Attributes:
        columns: names of the columns that make ``x``. group_sizes: as of the table.
    """

    def __init__(self, table: Any, target: str, schema: Any) -> None:
        self._table, self._target, self._schema = table, target, schema
        self.columns = [name for name in table.columns if name != target]
        self.group_sizes: list[int] = table.group_sizes
        kinds = {name: schema.field(name).type for name in self.columns}
        lists = [name for name, kind in kinds.items() if _is_of_lists(kind)]
        self._is_whole = len(kinds) == len(lists) == 1
        wrong = [name for name, kind in kinds.items() if not is_numeric(kind)]
        wrong += [] if self._is_whole else lists
        if wrong or not kinds:
            found = f"{wrong[0]}: {kinds[wrong[0]]}" if wrong else "none"
            raise ConfigurationError(
                f"target={target!r}: x is made of the other columns, which must be numbers, or of "
                f"one column of lists of numbers; found {found}. Say which with columns=[...], or "
                "leave target out and make pairs with Map."
            )

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Row ``index``."""
        return self._pair(self._table[index])

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> tuple[Any, Any]:
        """``x`` and ``y`` of the rows at ``indices``, as arrays."""
        return self._pair(self._table.__getitems__(indices))

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Any, Any]]:
        """The rows at ``indices`` one by one: what a ``collate_fn`` gets."""
        return [self._pair(row) for row in self._table.rows(indices)]

    def column(self, name: str) -> np.ndarray:
        """All values of a column, the target's included: labels for a sampler, for example."""
        values: np.ndarray = self._table.column(name)
        return values

    def _pair(self, values: dict[str, Any]) -> tuple[Any, Any]:
        y = values[self._target]
        if self._is_whole:
            return values[self.columns[0]], y
        columns = [values[name] for name in self.columns]
        return np.stack(columns, axis=-1).astype(np.float32), y

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetRows, (self._table, self._target, self._schema)


def _is_of_lists(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(leaf_type(kind) != kind and not types.is_dictionary(kind))
