"""Items ``(tokens, mask)`` of any data set, checked, and their lengths.

Imports layer 2: text.tokens.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text.tokens import TokenStore

__all__ = ["FlatRows", "TokenRows", "flat", "item", "lengths_of", "row_name"]

_LARGEST = np.iinfo(np.int32).max


@runtime_checkable
class TokenRows(Protocol):
    """A data set of ``(tokens, mask)`` that knows its lengths without giving the items."""

    lengths: np.ndarray

    def row_name(self, index: int) -> str:
        """What row ``index`` is called where it was read."""


@runtime_checkable
class FlatRows(Protocol):
    """A data set whose rows lie one after the other in flat arrays."""

    store: TokenStore


def flat(dataset: Any) -> TokenStore | None:
    """The flat arrays from which batches can be cut at once; None where items must be asked for.

    A list is in memory already, and becomes arrays here, which are smaller.

    Raises:
        DataError: a row of a list is not ``(tokens, mask)``.
    """
    if isinstance(dataset, FlatRows):
        return dataset.store
    if not isinstance(dataset, list | tuple):
        return None
    items = [item(dataset, index) for index in range(len(dataset))]
    offsets = np.cumsum([0, *[len(tokens) for tokens, _ in items]])
    tokens = np.concatenate([tokens for tokens, _ in items])
    mask = np.concatenate([mask != 0 for _, mask in items]).astype(np.uint8)
    return TokenStore(tokens, mask, offsets, np.arange(len(items)), {})


def row_name(dataset: Any, index: int) -> str:
    """What to call row ``index`` in messages."""
    return dataset.row_name(index) if isinstance(dataset, TokenRows) else f"row {index}"


def item(dataset: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int32, and mask of row ``index``, both of shape ``(tokens,)``.

    Raises:
        DataError: the row is something else.
    """
    row = dataset[index]
    try:
        tokens, mask = (np.asarray(part) for part in row)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"Row {index} is a {type(row).__name__}; expected (tokens, mask), two lists of the "
            "same length.",
            index=index,
        ) from error
    if tokens.ndim != 1 or tokens.shape != mask.shape:
        raise DataError(
            f"Row {index} has tokens of shape {tokens.shape} and a mask of shape {mask.shape}; "
            "expected one dimension and the same length.",
            index=index,
        )
    if len(tokens) and (tokens.dtype.kind not in "iu" or mask.dtype.kind not in "biuf"):
        raise DataError(
            f"Row {index} has tokens of dtype {tokens.dtype} and a mask of dtype {mask.dtype}; "
            "expected integers, and 1 where a token is a target.",
            index=index,
        )
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= _LARGEST:
        raise DataError(
            f"Row {index} has token ids from {tokens.min()} to {tokens.max()}; expected 0 to "
            "2^31 - 1. Padding is not needed, and what is no target has 0 in the mask.",
            index=index,
        )
    return tokens.astype(np.int32, copy=False), mask


def lengths_of(dataset: Any) -> np.ndarray:
    """Tokens of each row, int64. Reads every row unless the data set knows.

    Raises:
        ConfigurationError: ``dataset`` has no rows by index.
        DataError: it is empty, or a row is not ``(tokens, mask)``.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigurationError(
            f"dataset is a {type(dataset).__name__}; expected one with __len__ and __getitem__ "
            "whose items are (tokens, mask), such as TextDataset."
        )
    if isinstance(dataset, TokenRows):
        lengths = np.asarray(dataset.lengths, np.int64)
    else:
        lengths = np.array([len(item(dataset, i)[0]) for i in range(len(dataset))], np.int64)
    if not len(lengths):
        raise DataError(
            "The dataset is empty: 0 rows. If it is a TextDataset, print(dataset.report()) says "
            "what was dropped or skipped."
        )
    return lengths
