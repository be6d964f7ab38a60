"""How values, times and finished epochs are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fit.callbacks.base import numbers
from mlx_fit.callbacks.device_monitor import DEVICE_KEYS
from mlx_fit.pace import Pace

NOTABLE, NOTABLE_SECONDS = 0.1, 1.0  # a wait for data that an epoch's line tells of
MANY = 10_000  # whole numbers from here on are counts, or read as well without decimals


def format_value(value: float, is_count: bool = False) -> str:
    """Four decimals, or scientific below a thousandth, as Keras prints values; counts whole."""
    if float(value).is_integer() and (is_count or abs(value) >= MANY):
        return f"{value:.0f}"
    return f"{value:.4f}" if abs(value) > 1e-3 or value == 0 else f"{value:.4e}"


def values_of(logs: Mapping[str, Any]) -> list[str]:
    """``["loss: 0.5000", "accuracy: 0.9000"]``; matrices and facts of the machine are left out."""
    return [
        f"{key}: {format_value(value, _is_count(key))}"
        for key, value in numbers(logs).items()
        if key not in DEVICE_KEYS
    ]


def _is_count(key: str) -> bool:
    return key.removeprefix("val_").startswith("num_") or key == "skipped_updates"


def format_values(logs: Mapping[str, Any]) -> str:
    """``loss: 0.5000 - accuracy: 0.9000``."""
    return " - ".join(values_of(logs))


def format_share(pace: Pace) -> str:
    """The share of an epoch that is waiting for data: ``12%``."""
    return f"{pace.share_waited:.0%}"


def format_seconds(seconds: float) -> str:
    """``4s``, ``1:05`` or ``2:03:04``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary_line(
    count: int,
    expected: int | None,
    seconds: float,
    logs: Mapping[str, Any],
    pace: Pace | None = None,
) -> str:
    """``4/4 - 1s - 246ms/step - loss: 14.7808``.

    Args:
        count, expected: batches that were taken, and those that there are.
        seconds: since the pass began.
        logs: its values.
        pace: the clock of training, where evaluations and saves lie between; without it the time
            of a step is that of all of ``seconds``. A long wait for data is told.
    """
    if pace is None:
        each_ms = 1e3 * seconds / max(count, 1)
    else:
        each_ms = 1e3 * pace.seconds / max(pace.num_batches, 1)
    each = f"{each_ms:.0f}ms/step" if each_ms >= 1 else f"{1e3 * each_ms:.0f}us/step"
    total = count if expected is None else expected
    waits = pace is not None and pace.waited > NOTABLE_SECONDS and pace.share_waited > NOTABLE
    wait = f"{format_share(pace)} data wait" if waits and pace is not None else ""
    parts = [f"{count}/{total}", format_seconds(seconds), each, wait, format_values(logs)]
    return " - ".join(part for part in parts if part)
