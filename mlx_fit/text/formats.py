"""The formats of rows: how each is recognised, checked and read.

Imports layer 2: text.fields, text.messages, text.rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mlx_fit.text.fields import describe, listed, parsed, required, string
from mlx_fit.text.messages import CALLS, Chat, chat_message, check_turns, tool_list, turn_mapping
from mlx_fit.text.rows import Place

__all__ = ["FIELDS", "FORMATS", "Completion", "Document", "Example", "recognised"]


class Document(NamedTuple):
    """Plain text, all of which is learned."""

    text: str


class Completion(NamedTuple):
    """A prompt and what should follow it."""

    prompt: str
    completion: str


Example = Document | Completion | Chat

# Stanford's prompts (Taori et al., "Stanford Alpaca", 2023), on which such models were trained.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_SPEAKERS_ALLOWED = "human/user, gpt/assistant, system, tool/observation, function_call"


def _text(row: Mapping[str, Any], place: Place) -> Document:
    return Document(string(required(row, "text", place), "text", place))


def _completions(row: Mapping[str, Any], place: Place) -> Completion:
    prompt = string(required(row, "prompt", place), "prompt", place)
    return Completion(prompt, string(required(row, "completion", place), "completion", place))


def _alpaca(row: Mapping[str, Any], place: Place) -> Completion:
    instruction = string(required(row, "instruction", place), "instruction", place)
    given = row.get("input")
    context = "" if given is None else string(given, "input", place)
    output = string(required(row, "output", place), "output", place)
    for key in ("history", "system"):
        if row.get(key):
            raise place.error(
                f"field {key!r} has no place in an Alpaca prompt; write the row in the chat format "
                "('messages').",
                field=key,
            )
    template = _ALPACA_WITH_INPUT if context else _ALPACA
    # Not str.format, whose result would depend on braces within the fields of another template.
    prompt = template.replace("{input}", context, 1) if context else template
    return Completion(prompt.replace("{instruction}", instruction, 1), output)


def _chat(row: Mapping[str, Any], place: Place) -> Chat:
    key = "messages" if "messages" in row or "conversations" not in row else "conversations"
    messages, learned = [], []
    for number, turn in enumerate(listed(required(row, key, place), key, place)):
        where = f"{key}[{number}]"
        message, learns = chat_message(turn_mapping(turn, where, place), where, place)
        messages.append(message)
        learned.append(learns)
    check_turns([message["role"] for message in messages], key, place)
    return Chat(messages, learned, tool_list(row.get("tools"), "tools", place), key)


def _sharegpt(row: Mapping[str, Any], place: Place) -> Chat:
    key = "conversations"
    messages = []
    for number, turn in enumerate(listed(required(row, key, place), key, place)):
        where = f"{key}[{number}]"
        messages.append(_said(turn_mapping(turn, where, place), where, place))
    check_turns([message["role"] for message in messages], key, place)
    first = 0
    system = row.get("system")
    if system is not None and string(system, "system", place):
        if messages[0]["role"] == "system":
            raise place.error(
                "field 'system' is given, and conversations[0] is a system turn too; keep one.",
                field="system",
            )
        messages.insert(0, {"role": "system", "content": system})
        first = -1
    learned = [message["role"] == "assistant" for message in messages]
    return Chat(messages, learned, tool_list(row.get("tools"), "tools", place), key, first)


def _said(turn: Mapping[str, Any], where: str, place: Place) -> dict[str, Any]:
    """One turn of ShareGPT as a message."""
    speaker = required(turn, "from", place, where)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise place.error(
            f"{where}: from {describe(speaker)}; allowed are {_SPEAKERS_ALLOWED}.",
            field=f"{where}.from",
        )
    value = string(required(turn, "value", place, where), f"{where}.value", place)
    message: dict[str, Any] = {"role": _SPEAKERS[speaker], "content": value}
    if speaker == "function_call":
        message[CALLS] = _calls(value, f"{where}.value", place)
    return message


def _calls(value: str, where: str, place: Place) -> list[dict[str, Any]]:
    """The tool calls of a ``function_call`` turn: JSON of one call, or of a list of them."""
    found = parsed(value, where, place)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise place.error(
                f"{where} is {describe(value)}; a function_call is JSON with 'name' and "
                "'arguments'.",
                field=where,
            )
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for call in calls
    ]


#: Name -> how a row of that format is read. The order is that of recognition.
FORMATS: dict[str, Callable[[Mapping[str, Any], Place], Example]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completions": _completions,
    "text": _text,
}
#: Name -> the fields by which it is recognised.
FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completions": ("prompt", "completion"),
    "text": ("text",),
}


def recognised(row: Mapping[str, Any]) -> str | None:
    """The name of the format whose fields a row has, or None."""
    for name, fields in FIELDS.items():
        if all(field in row for field in fields):
            turns = row.get("conversations")
            if name == "sharegpt" and isinstance(turns, list | tuple) and turns:
                first = turns[0]
                if isinstance(first, Mapping) and "role" in first and "from" not in first:
                    return "chat"  # OpenAI's messages under ShareGPT's name
            return name
    return None
