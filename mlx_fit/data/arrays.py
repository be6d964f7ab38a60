"""What counts as an array in user data, how arrays nest, and their dtype in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mlx_fit.errors import DataError
from mlx_fit.foreign import is_mlx_array, is_torch_tensor, widened

__all__ = [
    "batch_dtype",
    "flatten",
    "is_array",
    "is_named_tuple",
    "is_scalar",
    "skeleton",
    "to_numpy",
    "unflatten",
]

_BATCH_PARTS = ("x", "y", "weights")


def is_array(value: object) -> bool:
    """Whether ``value`` is one array: NumPy's, MLX's, or anything else with ``__array__``.

    A list of numbers or strings (or of such lists) counts: it is a column that was never made an
    array. A list of anything else has structure.
    """
    if isinstance(value, list):
        first = value[0] if value else 0
        return is_scalar(first) or (isinstance(first, list) and is_array(first))
    return hasattr(value, "__array__") or is_mlx_array(value)


def is_scalar(value: object) -> bool:
    """Whether ``value`` is one number or string of Python or NumPy."""
    return isinstance(value, bool | int | float | complex | str | bytes | np.generic)


def is_named_tuple(value: object) -> bool:
    """Whether the class of ``value`` is a NamedTuple, which takes its fields one by one."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def to_numpy(value: Any) -> np.ndarray:
    """``value`` as a NumPy array, a view where possible; MLX is evaluated, bfloat16 widened.

    PyTorch's tensors may be on a device and need gradients; those of bfloat16 and float8 are
    widened, too. A list of strings gives an array of Python objects. Memory maps become plain
    arrays over the same file, whose indexing is cheaper.

    Raises:
        DataError: a tensor that is sparse or without data (on ``meta``).
    """
    if is_mlx_array(value):
        value = widened(value)
    elif is_torch_tensor(value):
        return _from_torch(value)
    elif isinstance(value, list) and value and isinstance(value[0], str | bytes):
        # As objects: NumPy's own strings lose zero bytes at their end, and all take the longest's.
        return np.array(value, dtype=object)
    return np.asarray(value)


def _from_torch(tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if str(tensor.dtype).startswith(("torch.bfloat16", "torch.float8")):
            tensor = tensor.float()  # NumPy has no such dtype
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"NumPy cannot read the tensor ({tensor.dtype}, {tensor.layout}, on {tensor.device}): "
            f"{error} Give dense tensors that hold data."
        ) from error


def batch_dtype(dtype: np.dtype) -> np.dtype | None:
    """The dtype in a batch: float64 becomes float32, others stay; None stands for a Python list."""
    if dtype.kind in "OSU":
        return None
    return np.dtype(np.float32) if dtype == np.float64 else dtype.newbyteorder("=")


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a tree of dicts, tuples and lists with its dotted path.

    At the top, a plain tuple is a batch: its parts are called x, y and weights.
    """
    if is_array(tree) or not isinstance(tree, dict | list | tuple):
        yield path, tree
        return
    for name, child in _children(tree, path):
        yield from flatten(child, f"{path}.{name}" if path else name)


def _children(tree: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(tree, dict):
        return ((str(key), child) for key, child in tree.items())
    if is_named_tuple(tree):
        return zip(tree._fields, tree, strict=True)
    if not path and type(tree) is tuple and len(tree) <= len(_BATCH_PARTS):
        return zip(_BATCH_PARTS, tree, strict=False)
    return ((str(position), child) for position, child in enumerate(tree))


def skeleton(tree: Any) -> Any:
    """The structure of ``tree``, with None for each leaf."""
    if is_array(tree) or not isinstance(tree, dict | list | tuple):
        return None
    leaves = [skeleton(child) for child in (tree.values() if isinstance(tree, dict) else tree)]
    return _like(tree, leaves)


def unflatten(structure: Any, leaves: Iterator[Any]) -> Any:
    """The inverse of :func:`flatten`: a :func:`skeleton` with ``leaves`` filled in."""
    if structure is None:
        return next(leaves)
    children = structure.values() if isinstance(structure, dict) else structure
    return _like(structure, [unflatten(child, leaves) for child in children])


def _like(tree: Any, children: list[Any]) -> Any:
    if isinstance(tree, dict):
        return dict(zip(tree, children, strict=True))
    if is_named_tuple(tree):
        return type(tree)(*children)
    return tuple(children) if isinstance(tree, tuple) else children
