"""What a batch is, and how it reaches the device.

A batch is ``x``, ``(x, y)`` or ``(x, y, weights)``, as a tuple or a list, where each part is a tree
(dict, list, tuple) of arrays with a common leading axis, the rows. A NamedTuple is a batch of its
own kind, for objectives that know it: :class:`TextBatch` is the one of this package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_fit._tree import leaves
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.foreign import is_torch_tensor

PLAIN = frozenset(np.dtype(code) for code in "?bBhHiIlLqQefd")  # dtypes that MLX takes as they are


class Parts(NamedTuple):
    """A batch taken apart; ``None`` where it has no targets or no weights."""

    x: Any
    y: Any
    weights: Any


class TextBatch(NamedTuple):
    """A batch of token sequences for a language model, each array of shape ``(batch, length)``.

    Attributes:
        tokens: int32, the documents, padded on the right with 0.
        targets: int32, the token that follows each one; 0 where there is none.
        weights: float32, 1 where a target counts, else 0: at padding, at the last token of a
            document, and at what training is not meant to learn.
        segments: int32, the number of the document within its row, from 1; 0 at padding.
    """

    tokens: Any
    targets: Any
    weights: Any
    segments: Any


def unpack(batch: Any) -> Parts:
    """Take a batch apart into inputs, targets and weights."""
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        if not 1 <= len(batch) <= 3:
            raise DataError(
                f"A batch has {len(batch)} parts; expected x, (x, y) or (x, y, weights). "
                "Several inputs go into one part: ((x1, x2), y) or ({'a': x1, 'b': x2}, y). "
                "Rows go into one array: np.array([[1, 2], [3, 4]])."
            )
        return Parts(*batch, *(None,) * (3 - len(batch)))
    return Parts(batch, None, None)


def to_mlx(batch: Any) -> Any:
    """The batch with every array (NumPy, torch, anything with ``__array__``) as an MLX array.

    float64 becomes float32; integers and bool stay.
    """
    kind = type(batch)
    if kind is mx.array:
        return batch
    if kind is np.ndarray:
        return mx.array(batch) if _is_plain(batch) else _from_numpy(batch)
    if kind is tuple or kind is list:
        parts = []
        for part in batch:  # plain arrays in line: most batches are (x, y), and calls are counted
            if type(part) is np.ndarray and part.dtype in PLAIN and part.flags.c_contiguous:
                parts.append(mx.array(part))
            else:
                parts.append(to_mlx(part))
        return tuple(parts) if kind is tuple else parts
    if isinstance(batch, dict):
        return {key: to_mlx(value) for key, value in batch.items()}
    if isinstance(batch, tuple):  # a NamedTuple keeps its type
        return kind(*[to_mlx(part) for part in batch])
    return None if batch is None else _from_numpy(batch)


def _is_plain(array: np.ndarray) -> bool:
    return array.dtype in PLAIN and array.flags.c_contiguous


def _from_torch(tensor: Any) -> mx.array:
    tensor = tensor.detach().cpu()  # both leave a plain tensor as it is
    if str(tensor.dtype) == "torch.bfloat16":  # which NumPy does not have
        return mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    try:
        return _from_numpy(tensor.numpy())
    except TypeError as error:
        raise DataError(
            f"A batch holds Tensor data that NumPy cannot read: {error} Give dense tensors."
        ) from error


def _from_numpy(leaf: Any) -> mx.array:
    """An array that MLX cannot take as it is: its strides, its byte order, or no NumPy array."""
    if is_torch_tensor(leaf):
        return _from_torch(leaf)
    try:
        array = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    except Exception as error:
        raise DataError(
            f"A batch holds {type(leaf).__name__} data that NumPy cannot read: {error} Give NumPy "
            "or MLX arrays, or dense tensors."
        ) from error
    if array.dtype.kind not in "fiubc":
        raise DataError(
            f"A batch holds {type(leaf).__name__} data of dtype {array.dtype}, which is not "
            "numeric. Leave the field out, or turn it into numbers, before it reaches the trainer."
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        return mx.array(array.astype(np.float32))
    return mx.array(array.astype(array.dtype.newbyteorder("="), copy=False))


def signature(batch: Any) -> Any:
    """A hashable key of a batch's structure, shapes and dtypes: what a compiled step depends on."""
    kind = type(batch)
    if kind is mx.array:
        return batch.shape, batch.dtype
    if kind is tuple or kind is list:
        parts: list[Any] = [kind]
        for part in batch:
            if type(part) is mx.array:
                parts.append(part.shape)
                parts.append(part.dtype)
            else:
                parts.append(signature(part))
        return tuple(parts)
    if isinstance(batch, dict):
        return tuple([(key, signature(value)) for key, value in batch.items()])
    if isinstance(batch, tuple):
        return (kind, *[signature(part) for part in batch])
    return batch


def num_rows(batch: Any) -> int:
    """Rows of a batch: the length of its first array's leading axis."""
    for _, leaf in leaves(batch):
        shape = getattr(leaf, "shape", None)
        if shape:
            return shape[0]
        break
    raise DataError(
        "A batch does not begin with an array of rows; expected x, (x, y) or (x, y, weights), each "
        "an array with the rows as its first axis. Turn lists of numbers into arrays: "
        "np.array([[1, 2], [3, 4]])."
    )


def rows_between(batch: Any, start: int, stop: int) -> Any:
    """Rows of a batch, its structure kept. Arrays of NumPy and MLX, and tensors, are not copied.

    Raises:
        DataError: it holds an array without rows.
    """
    if isinstance(batch, dict):
        return {key: rows_between(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [rows_between(part, start, stop) for part in batch]
        if hasattr(batch, "_fields"):  # a NamedTuple keeps its type
            return type(batch)(*parts)
        return tuple(parts) if isinstance(batch, tuple) else parts
    if batch is None:
        return None
    leaf = batch if hasattr(batch, "shape") else np.asarray(batch)
    if not leaf.shape:
        raise DataError(
            "A batch holds an array without an axis of rows, so it cannot be cut into parts. Give "
            "each array the rows as its first axis."
        )
    return leaf[start:stop]


def is_empty(batch: Any) -> bool:
    """Whether an array of the batch has no rows."""
    return any(getattr(leaf, "shape", ())[:1] == (0,) for _, leaf in leaves(batch))


def describe(batch: Any) -> str:
    """Names, shapes and dtypes of a batch in one line, for messages."""
    names: Any = getattr(batch, "_fields", ("x", "y", "weights"))
    if not isinstance(batch, (tuple, list)) or len(batch) > len(names):
        names, batch = ("batch",), (batch,)
    return ", ".join(
        f"{path}: {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('mlx.core.')}"
        for path, leaf in leaves(dict(zip(names, batch, strict=False)))
        if hasattr(leaf, "shape")
    )


def join_outputs(parts: list[Any], remedy: str) -> Any:
    """Outputs for several batches, trees of NumPy arrays, as one tree; None stays None.

    Raises:
        ConfigurationError: one is a scalar, which has no rows; ``remedy`` says what to do.
    """

    def joined(*leaves: Any) -> Any:
        if leaves[0] is None:
            return None
        if leaves[0].ndim == 0:
            raise ConfigurationError(
                "The model returned a scalar for a batch, which has no rows to put in order. "
                f"{remedy}"
            )
        return np.concatenate(leaves)

    return tree_map(joined, parts[0], *parts[1:])
