"""What the ranks of a run must agree on, and where two of them differ first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ABSENT = "nothing"


def canonical(plan: Any) -> Any:
    """A plan as JSON keeps it: dtypes and other objects become their text, tuples lists."""
    if isinstance(plan, Mapping):
        return {str(key): canonical(value) for key, value in plan.items()}
    if isinstance(plan, (list, tuple)):
        return [canonical(value) for value in plan]
    return plan if plan is None or isinstance(plan, (bool, int, float, str)) else str(plan)


def digest(plan: Any) -> str:
    """A hash of a canonical plan; the order of its keys counts, as that of collectives does."""
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def first_difference(one: Any, other: Any, path: str = "") -> tuple[str, str, str] | None:
    """The first entry where two canonical plans differ: its path and both values as text.

    Example:
        >>> first_difference({"w": {"shape": [64, 8]}}, {"w": {"shape": [65, 8]}})
        ('w.shape', '[64, 8]', '[65, 8]')
    """
    if json.dumps(one) == json.dumps(other):
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        return _first_of(one, other, path)
    if isinstance(one, list) and isinstance(other, list) and not _is_shape(one + other):
        return _first_of(_numbered(one), _numbered(other), path)
    return path, _text(one), _text(other)


def _first_of(one: dict[str, Any], other: dict[str, Any], path: str) -> tuple[str, str, str]:
    for key in [*one, *(key for key in other if key not in one)]:
        below = f"{path}{'' if key.startswith('[') or not path else '.'}{key}"
        if key not in one or key not in other:
            return below, _text(one.get(key, ABSENT)), _text(other.get(key, ABSENT))
        if difference := first_difference(one[key], other[key], below):
            return difference
    return f"order of {path or 'the entries'}", ", ".join(one), ", ".join(other)


def _numbered(values: list[Any]) -> dict[str, Any]:
    return {f"[{index}]": value for index, value in enumerate(values)}


def _is_shape(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
