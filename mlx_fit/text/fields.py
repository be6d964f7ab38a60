"""Fields of rows, checked, with one wording for all. Imports layer 2: text.rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_fit.text.rows import Place

__all__ = ["describe", "listed", "parsed", "required", "string"]


def describe(value: Any) -> str:
    """A value in a few words, for messages."""
    if value is None:
        return "null"
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {text[:40]}..." if len(text) > 40 else f"{kind} {text}"


def required(row: Mapping[str, Any], key: str, place: Place, where: str = "") -> Any:
    """``row[key]``; ``where`` is the path of ``row`` within its row.

    Raises:
        DataError: it is missing.
    """
    if key not in row:
        have = ", ".join(map(str, row)) or "nothing"
        prefix = f"{where}: " if where else ""
        field = f"{where}.{key}" if where else key
        raise place.error(f"{prefix}field {key!r} missing (have: {have}).", field=field)
    return row[key]


def string(value: Any, field: str, place: Place) -> str:
    """``value`` if it is a string that can be written in UTF-8.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        raise place.error(f"field {field!r} is {describe(value)}; expected a string.", field=field)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise place.error(
                f"field {field!r} holds half a surrogate pair at character {error.start}, which "
                "is no text. Repair the escape \\uD800-\\uDFFF there.",
                field=field,
            ) from error
    return value


def listed(value: Any, field: str, place: Place) -> list[Any]:
    """``value`` if it is a list with something in it.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, list | tuple):
        raise place.error(f"field {field!r} is {describe(value)}; expected a list.", field=field)
    if not value:
        raise place.error(f"field {field!r} is an empty list; expected turns.", field=field)
    return list(value)


def parsed(value: Any, field: str, place: Place) -> Any:
    """``value``, read as JSON where it is a string.

    Raises:
        DataError: it is a string that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(string(value, field, place))
    except (ValueError, RecursionError) as error:
        raise place.error(
            f"field {field!r} is {describe(value)}, which is not JSON: {error}", field=field
        ) from error
