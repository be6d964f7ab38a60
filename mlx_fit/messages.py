"""Plain values, arrays and errors as bytes, to be sent from rank to rank. Reading runs no code."""

from __future__ import annotations

import builtins
import json
import struct
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit import errors
from mlx_fit.errors import DistributedError, MlxFitError, PeerError

_ARRAY, _TUPLE = "__array__", "__tuple__"


def pack(value: Any) -> bytes:
    """A tree of dicts, lists, tuples, plain values and NumPy arrays as bytes.

    Dicts keep keys of text only; NumPy's scalars become Python's.
    """
    parts: list[bytes] = []
    head = json.dumps(_plain(value, parts)).encode()
    return b"".join([struct.pack("<q", len(head)), head, *parts])


def unpack(message: bytes) -> Any:
    """The inverse of :func:`pack`; arrays are copies."""
    (length,) = struct.unpack_from("<q", message)
    head = json.loads(message[8 : 8 + length])
    return _value(head, memoryview(message)[8 + length :])


def _plain(value: Any, parts: list[bytes]) -> Any:
    if isinstance(value, mx.array):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        start = sum(map(len, parts))
        parts.append(np.ascontiguousarray(value).tobytes())
        return {_ARRAY: [value.dtype.str, list(value.shape), start]}
    if isinstance(value, dict):
        return {str(key): _plain(child, parts) for key, child in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(child, parts) for child in value]}
    if isinstance(value, list):
        return [_plain(child, parts) for child in value]
    return value.item() if isinstance(value, np.generic) else value


def _value(head: Any, data: memoryview) -> Any:
    if isinstance(head, list):
        return [_value(child, data) for child in head]
    if not isinstance(head, dict):
        return head
    if head.keys() == {_TUPLE}:
        return tuple(_value(child, data) for child in head[_TUPLE])
    if head.keys() == {_ARRAY}:
        code, shape, start = head[_ARRAY]
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(data, np.dtype(code), count, start).reshape(shape).copy()
    return {key: _value(child, data) for key, child in head.items()}


def describe_error(error: BaseException) -> dict[str, Any]:
    """An error as plain values."""
    facts = error.__dict__ if isinstance(error, MlxFitError) else {}
    return json.loads(
        json.dumps(
            {
                "type": type(error).__name__,
                "message": str(error),
                "args": list(error.args),
                "facts": {k: v for k, v in facts.items() if not k.startswith("_")},
            },
            default=str,
        )
    )


def error_of(described: dict[str, Any], rank: int, step: int) -> Exception:
    """The error that another rank raised: of its own kind where that is ours or Python's own.

    Args:
        described: from :func:`describe_error`.
        rank: where it was raised.
        step: what was under way there.
    """
    name, args, facts = described["type"], described["args"], described["facts"]
    if name in errors.__all__:
        error = errors.rebuilt(getattr(errors, name), tuple(args), facts)
    else:
        error = _builtin(name, args)
    if error is None or isinstance(error, DistributedError):
        error = error or PeerError(
            f"Rank {rank} raised {name}: {described['message']}",
            rank=rank,
            step=step,
            type=name,
            message=described["message"],
        )
    error.add_note(f"Raised on rank {rank}.")
    return error


def _builtin(name: str, args: list[Any]) -> Exception | None:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, (OSError, ValueError, ArithmeticError))):
        return None
    try:
        return kind(*args)
    except TypeError:
        return None
