"""Checks and small conversions of what the trainer's methods are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.data.arrays import is_array
from mlx_fit.data.sources import split_rows
from mlx_fit.errors import ConfigurationError


def split_validation(train: Any, val: Any, fraction: float) -> tuple[Any, Any]:
    """Training and validation data of ``fit``, the latter split off where asked for."""
    if is_array(train) and is_array(val):
        raise ConfigurationError(
            "fit(x, y) got two arrays: the second argument is validation data. Write "
            "fit((x, y)), with the pair in one tuple."
        )
    if not 0.0 <= fraction < 1.0:
        raise ConfigurationError(f"validation_split={fraction!r}; expected 0 <= share < 1.")
    if fraction and val is None:
        return split_rows(train, fraction)
    return train, val


def check_trainer(model: Any, optimizer: Any, batch_size: Any, seed: Any) -> None:
    """Raise for what a trainer cannot be made of."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"model is {type(model).__name__}; expected an mlx.nn.Module. The weights of a torch "
            "module must be copied into an mlx.nn model first."
        )
    if optimizer is not None and not isinstance(optimizer, optim.Optimizer):
        raise ConfigurationError(
            f"optimizer is {optimizer!r}; expected an MLX optimizer, such as "
            "mlx.optimizers.AdamW(learning_rate=1e-3)."
        )
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigurationError(f"batch_size={batch_size!r}; expected an int of at least 1.")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise ConfigurationError(f"seed={seed!r}; expected a non-negative int or None.")


def as_batch(x: Any, y: Any, weights: Any) -> Any:
    """One batch from separate arguments."""
    if weights is not None:
        return (x, y, weights)
    return x if y is None else (x, y)


def weights_path(path: str | Path) -> Path:
    """The path of a weights file.

    Raises:
        ConfigurationError: it has another suffix than ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(
            f"{path} has the suffix {path.suffix!r}; weights are written as .safetensors."
        )
    return path
