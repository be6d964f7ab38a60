"""Logged values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError


def as_json(value: Any) -> Any:
    """A value as plain JSON: NumPy's and MLX's numbers and arrays too; NaN and infinity are null.

    Raises:
        ConfigurationError: it is, or holds, something that JSON has no form for.

    >>> as_json({"loss": np.float32(0.5), "matrix": np.eye(2), "bad": math.nan})
    {'loss': 0.5, 'matrix': [[1.0, 0.0], [0.0, 1.0]], 'bad': None}
    """
    if isinstance(value, (mx.array, np.ndarray)):
        value = value.tolist()  # host synchronisation, for what a user's callback logged
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    raise ConfigurationError(
        f"The logs hold a {type(value).__name__}, {value!r}, which JSON has no form for. Log "
        "numbers, texts, lists and dicts of them."
    )


def dumps(value: Any) -> str:
    """One line of JSON."""
    import json  # here: importing mlx_fit stays cheap

    return json.dumps(value, allow_nan=False)
