"""Arrays of other libraries, told without importing them: a worker process may need neither."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

__all__ = ["is_mlx_array", "is_torch_tensor", "widened"]


def is_mlx_array(value: object) -> bool:
    """Whether ``value`` is an MLX array, of which there are none before MLX is imported."""
    core = sys.modules.get("mlx.core")
    return core is not None and isinstance(value, core.array)


def is_torch_tensor(value: object) -> bool:
    """Whether ``value`` is a PyTorch tensor; PyTorch is not imported to tell."""
    if isinstance(value, np.ndarray):
        return False  # soon told, of most
    return any(k.__module__ == "torch" and k.__name__ == "Tensor" for k in type(value).__mro__)


def widened(value: Any) -> Any:
    """An MLX array as NumPy can read it: bfloat16, which NumPy does not have, as float32."""
    core = sys.modules["mlx.core"]
    return value.astype(core.float32) if value.dtype == core.bfloat16 else value
