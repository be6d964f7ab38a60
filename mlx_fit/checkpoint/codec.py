"""Trees of plain values and arrays as JSON, with the arrays apart."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import CheckpointCorruptError, ConfigurationError

_DTYPES = {
    str(dtype).removeprefix("mlx.core."): dtype
    for dtype in (
        *(mx.bool_, mx.int8, mx.int16, mx.int32, mx.int64),
        *(mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.float16, mx.float32, mx.float64),
    )
}


class Encoder:
    """Turns trees into JSON values and collects their arrays.

    Values that JSON does not have are dicts with one key that starts with ``$``: non-finite
    floats, tuples, dicts whose keys are no plain strings, and arrays.

    Args:
        inline: arrays of at most so many numbers are written into the JSON.

    Attributes:
        arrays: name -> array, to be saved beside the JSON.
    """

    def __init__(self, inline: int = 0) -> None:
        self.arrays: dict[str, mx.array] = {}
        self._inline = inline

    def encode(self, value: Any, path: str) -> Any:
        """``value`` as JSON; ``path`` names it in messages and its arrays in the file.

        Raises:
            ConfigurationError: it holds something that is neither a plain value nor an array.
        """
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, (mx.array, np.ndarray)):
            return self._array(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, list) and _is_plain(value):
            return list(value)
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise ConfigurationError(
            f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; expected plain "
            "values (numbers, texts, None, lists, dicts) and arrays."
        )

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{path}.{key}") for key, item in value.items()}
        pairs = [(self.encode(k, path), self.encode(v, f"{path}.{k}")) for k, v in value.items()]
        return {"$pairs": [list(pair) for pair in pairs]}

    def _array(self, value: mx.array | np.ndarray, path: str) -> Any:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise ConfigurationError(f"{path} is an array of objects; expected numbers.")
            facts = {"dtype": value.dtype.str, "shape": list(value.shape)}
            # As bytes: safetensors and MLX do not have all of NumPy's types.
            flat = mx.array(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            return {"$numpy": {**facts, "data": self._array(flat, path)}}
        dtype = str(value.dtype).removeprefix("mlx.core.")
        if value.size <= self._inline and dtype in _DTYPES:
            values = self.encode(value.reshape(-1).tolist(), path)
            return {"$array": {"dtype": dtype, "shape": list(value.shape), "values": values}}
        name, number = path, 0
        while name in self.arrays:
            number += 1
            name = f"{path}~{number}"
        self.arrays[name] = value
        return {"$array": {"name": name}}


def _is_plain(values: list[Any]) -> bool:
    """Whether JSON has all of a list, found out without a look at each: curves grow long."""
    kinds = set(map(type, values))
    if kinds <= {int, bool, str, type(None)}:
        return True
    return kinds == {float} and all(map(math.isfinite, values))


def decode(value: Any, arrays: Mapping[str, mx.array]) -> Any:
    """What :class:`Encoder` was given.

    Raises:
        CheckpointCorruptError: the JSON names an array that is not there, or says nonsense.
    """
    if isinstance(value, list):
        return [decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith("$"):
        return {key: decode(item, arrays) for key, item in value.items()}
    try:
        return _special(tag, value[tag], arrays)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointCorruptError(
            f"The checkpoint describes a value that cannot be: {json.dumps(value)[:200]}."
        ) from error


def _special(tag: str, content: Any, arrays: Mapping[str, mx.array]) -> Any:
    if tag == "$float":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
    if tag == "$tuple":
        return tuple(decode(item, arrays) for item in content)
    if tag == "$pairs":
        return {decode(key, arrays): decode(item, arrays) for key, item in content}
    if tag == "$array":
        if "name" in content:
            return arrays[content["name"]]
        values = decode(content["values"], arrays)
        dtype = _numpy_dtype(content["dtype"])
        return mx.array(np.array(values, dtype).reshape(content["shape"]))
    if tag == "$numpy":
        flat = np.array(decode(content["data"], arrays))
        dtype = np.dtype(content["dtype"])
        if dtype.hasobject:
            raise ValueError("an array of objects")
        return flat.view(dtype).reshape(content["shape"])
    raise KeyError(tag)


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(bool if _DTYPES[name] == mx.bool_ else name)
