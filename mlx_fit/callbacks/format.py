"""How values, times and finished epochs are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fit.callbacks.base import numbers
from mlx_fit.callbacks.device_monitor import DEVICE_KEYS


def format_value(value: float) -> str:
    """Four decimals, or scientific below a thousandth, as Keras prints values."""
    return f"{value:.4f}" if abs(value) > 1e-3 or value == 0 else f"{value:.4e}"


def values_of(logs: Mapping[str, Any]) -> list[str]:
    """``["loss: 0.5000", "accuracy: 0.9000"]``; matrices and facts of the machine are left out."""
    return [
        f"{key}: {format_value(value)}"
        for key, value in numbers(logs).items()
        if key not in DEVICE_KEYS
    ]


def format_values(logs: Mapping[str, Any]) -> str:
    """``loss: 0.5000 - accuracy: 0.9000``."""
    return " - ".join(values_of(logs))


def format_seconds(seconds: float) -> str:
    """``4s``, ``1:05`` or ``2:03:04``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary_line(count: int, expected: int | None, seconds: float, logs: Mapping[str, Any]) -> str:
    """``4/4 - 1s - 246ms/step - loss: 14.7808``."""
    each_ms = 1e3 * seconds / max(count, 1)
    each = f"{each_ms:.0f}ms/step" if each_ms >= 1 else f"{1e3 * each_ms:.0f}us/step"
    total = count if expected is None else expected
    parts = [f"{count}/{total}", format_seconds(seconds), each, format_values(logs)]
    return " - ".join(part for part in parts if part)
