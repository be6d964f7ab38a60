"""Messages of a chat, checked and in the one shape that chat templates know.

Imports layer 2: text.fields, text.rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_fit.text.fields import describe, listed, parsed, required, string
from mlx_fit.text.rows import Place

__all__ = ["CALLS", "ROLES", "Chat", "chat_message", "check_turns", "tool_list", "turn_mapping"]

#: Key of a message whose content is tool calls as JSON: what a template that knows them gets.
CALLS = "function_call"
ROLES = ("system", "developer", "user", "assistant", "tool")
_RULE = (
    "Turns are: at most one system turn, then user, then assistant, and so on, ending with an "
    "assistant; tool turns answer an assistant."
)


class Chat(NamedTuple):
    """A conversation.

    Attributes:
        messages: dicts with ``role`` and ``content``, as chat templates take them.
        learned: for each message whether it may be a target: assistant turns, unless their row
            gives them ``"weight": 0``.
        tools: JSON schemas of functions, or None.
        field: the list's name in its row.
        first: index in that list of the first message; -1 where a system message comes from a field
            of its own.
    """

    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[Any] | None
    field: str = "messages"
    first: int = 0

    def turn(self, number: int) -> str:
        """What message ``number`` is called in its row."""
        return f"{self.field}[{number + self.first}]"


def turn_mapping(value: Any, where: str, place: Place) -> Mapping[str, Any]:
    """A turn that is an object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise place.error(f"{where} is {describe(value)}; expected an object.", field=where)
    return value


def chat_message(turn: Mapping[str, Any], where: str, place: Place) -> tuple[dict[str, Any], bool]:
    """A message in OpenAI's shape, and whether it may be learned.

    Content that is a list of text parts is joined, and the arguments of tool calls, which OpenAI
    writes as JSON in a string, become objects, which is what chat templates expect.

    Raises:
        DataError: a field is missing or has the wrong type.
    """
    role = required(turn, "role", place, where)
    if role not in ROLES:
        raise place.error(
            f"{where}: role {describe(role)}; allowed are {', '.join(ROLES)}.",
            field=f"{where}.role",
        )
    calls = turn.get("tool_calls")
    message = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in ("weight", CALLS)
    }
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls", place)
        if role != "assistant":
            raise place.error(
                f"{where}: tool_calls in a {role} turn; only an assistant calls tools.",
                field=f"{where}.tool_calls",
            )
        content = turn.get("content")  # null, or left out, beside tool calls
        message["content"] = "" if content is None else _text(content, f"{where}.content", place)
    else:
        message.pop("tool_calls", None)
        content = required(turn, "content", place, where)
        message["content"] = _text(content, f"{where}.content", place)
    for key in ("name", "reasoning_content", "tool_call_id"):
        if key in message:
            string(message[key], f"{where}.{key}", place)
    return message, role == "assistant" and _weight(turn, where, place)


def _weight(turn: Mapping[str, Any], where: str, place: Place) -> bool:
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise place.error(
            f"{where}: weight {describe(weight)}; expected 0 (not a target) or 1.",
            field=f"{where}.weight",
        )
    return bool(weight)


def _text(content: Any, where: str, place: Place) -> str:
    if not isinstance(content, list):
        return string(content, where, place)
    texts = []
    for number, part in enumerate(content):
        field = f"{where}[{number}]"
        kind = turn_mapping(part, field, place).get("type", "text")
        if kind != "text":
            raise place.error(
                f"{field} is of type {describe(kind)}; expected 'text', the only content that can "
                "be trained on.",
                field=f"{field}.type",
            )
        texts.append(string(required(part, "text", place, field), f"{field}.text", place))
    return "".join(texts)


def _tool_calls(calls: Any, where: str, place: Place) -> list[dict[str, Any]]:
    checked = []
    for number, call in enumerate(listed(calls, where, place)):
        field = f"{where}[{number}]"
        turn_mapping(call, field, place)
        function = turn_mapping(
            required(call, "function", place, field), f"{field}.function", place
        )
        string(required(function, "name", place, f"{field}.function"), f"{field}.name", place)
        arguments = parsed(function.get("arguments", {}), f"{field}.function.arguments", place)
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def tool_list(value: Any, field: str, place: Place) -> list[Any] | None:
    """Tools of a row: a list of JSON schemas, or that list as JSON in a string; None for none.

    Raises:
        DataError: it is something else.
    """
    tools = None if value is None or value == "" else parsed(value, field, place)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise place.error(
            f"field {field!r} is {describe(tools)}; expected a list of JSON schemas.", field=field
        )
    return [dict(tool) for tool in tools]


def check_turns(roles: list[str], where: str, place: Place) -> None:
    """Check the order of turns.

    Args:
        roles: of :data:`ROLES`, one for each turn.
        where: name of the list in its row.

    Raises:
        DataError: the order cannot be learned from.
    """

    def wrong(number: int, what: str) -> Exception:
        turn = f"{where}[{number}]"
        return place.error(f"{turn}: {what}. {_RULE}", field=turn)

    before = ""
    for number, role in enumerate(roles):
        if role in ("system", "developer") and number:
            raise wrong(number, f"a {role} turn that is not the first")
        if role == "user" and before == "user":
            raise wrong(number, "two user turns in a row")
        if role == "assistant" and before in ("", "system", "developer"):
            raise wrong(number, "an assistant turn before any user turn")
        if role == "tool" and before not in ("assistant", "tool"):
            raise wrong(number, "a tool turn that answers no assistant")
        before = role
    if before != "assistant":
        raise wrong(len(roles) - 1, f"the last turn is {before}, which leaves no answer to learn")
