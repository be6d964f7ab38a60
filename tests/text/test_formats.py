"""Each format read, and each way in which a row can be wrong."""

from __future__ import annotations

import pytest

from mlx_fit.errors import DataError
from mlx_fit.text.formats import FORMATS, Completion, Document, recognised
from mlx_fit.text.rows import Place

PLACE = Place(3, "train.jsonl", 4)


def read(format, **row):
    return FORMATS[format](row, PLACE)


def wrong(format, **row):
    """The text of the error, without the place, which is checked, and its field."""
    with pytest.raises(DataError) as caught:
        read(format, **row)
    assert str(caught.value).startswith("train.jsonl:4:1: ")
    assert (caught.value.line, caught.value.index) == (4, 3)
    return str(caught.value).removeprefix("train.jsonl:4:1: "), caught.value.field


def said(*turns):
    return [{"from": speaker, "value": "x"} for speaker in turns]


def roles(*turns):
    return [{"role": role, "content": "x"} for role in turns]


def test_text_and_completions_are_taken_as_they_are():
    assert read("text", text=" a ", more=1) == Document(" a ")
    assert read("completions", prompt="p ", completion="c") == Completion("p ", "c")


def test_alpaca_is_written_in_stanfords_prompt():
    prompt, completion = read(
        "alpaca", instruction="Add {input}.", input="1 {instruction}", output="2"
    )
    assert prompt.endswith(
        "### Instruction:\nAdd {input}.\n\n### Input:\n1 {instruction}\n\n### Response:\n"
    )
    assert "paired with an input" in prompt
    assert completion == "2"
    bare, _ = read("alpaca", instruction="Add.", input="", output="2")
    assert bare.endswith("### Instruction:\nAdd.\n\n### Response:\n")
    assert "input" not in bare
    assert read("alpaca", instruction="Add.", output="2").prompt == bare


def test_sharegpt_becomes_messages_with_their_roles():
    chat = read(
        "sharegpt",
        conversations=[
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "b"},
            {"from": "gpt", "value": "c"},
        ],
        system="s",
        tools='[{"name": "f"}]',
    )
    assert [m["role"] for m in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert chat.learned == [False, False, True, False, True]
    assert chat.tools == [{"name": "f"}]
    assert chat.turn(1) == "conversations[0]"
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert chat.messages[2]["function_call"] == [call]


def test_chat_messages_take_the_shape_that_templates_expect():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = read(
        "chat",
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "assistant", "content": "z", "weight": 1, "tool_calls": []},
        ],
        tools=[{"type": "function"}],
    )
    assert chat.messages[1] == {"role": "user", "content": "ab"}
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert chat.messages[4] == {"role": "assistant", "content": "z"}
    assert chat.learned == [False, False, False, False, True]
    assert call["function"]["arguments"] == '{"x": 1}', "the user's row is left alone"


@pytest.mark.parametrize(
    ("format", "row", "text", "field"),
    [
        ("text", {"body": "x"}, "field 'text' missing (have: body)", "text"),
        ("text", {}, "field 'text' missing (have: nothing)", "text"),
        ("text", {"text": None}, "field 'text' is null; expected a string", "text"),
        ("text", {"text": 7}, "field 'text' is int 7; expected a string", "text"),
        ("text", {"text": "a\ud800"}, "half a surrogate pair at character 1", "text"),
        ("completions", {"prompt": "x"}, "field 'completion' missing (have: prompt)", "completion"),
        ("completions", {"prompt": [], "completion": "x"}, "field 'prompt' is list []", "prompt"),
        ("alpaca", {"instruction": "x", "output": 1}, "field 'output' is int 1", "output"),
        (
            "alpaca",
            {"instruction": "x", "input": 3, "output": "y"},
            "field 'input' is int",
            "input",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            "no place in an Alpaca prompt",
            "history",
        ),
        ("chat", {"text": "x"}, "field 'messages' missing (have: text)", "messages"),
        ("chat", {"messages": "x"}, "field 'messages' is str 'x'; expected a list", "messages"),
        ("chat", {"messages": []}, "field 'messages' is an empty list", "messages"),
        ("chat", {"messages": ["x"]}, "messages[0] is str 'x'; expected an object", "messages[0]"),
        (
            "chat",
            {"messages": roles("bot")},
            "role str 'bot'; allowed are system",
            "messages[0].role",
        ),
        ("chat", {"messages": roles([1])}, "role list [1]; allowed are", "messages[0].role"),
        (
            "chat",
            {"messages": [{"role": "user"}]},
            "messages[0]: field 'content' missing (have: role)",
            "messages[0].content",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is of type str 'image_url'",
            "messages[0].content[0].type",
        ),
        (
            "chat",
            {"messages": [*roles("user"), {"role": "assistant", "content": "x", "weight": 2}]},
            "weight int 2; expected 0",
            "messages[1].weight",
        ),
        (
            "chat",
            {
                "messages": [
                    {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}
                ]
            },
            "tool_calls in a user turn",
            "messages[0].tool_calls",
        ),
        (
            "chat",
            {
                "messages": [
                    *roles("user"),
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    },
                ]
            },
            "which is not JSON",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            "chat",
            {"messages": roles("user", "assistant"), "tools": "{"},
            "field 'tools' is str '{', which is not JSON",
            "tools",
        ),
        (
            "chat",
            {"messages": roles("user", "assistant"), "tools": [1]},
            "list of JSON schemas",
            "tools",
        ),
        (
            "sharegpt",
            {"conversations": [*said("human"), {"value": "x"}]},
            "conversations[1]: field 'from' missing (have: value)",
            "conversations[1].from",
        ),
        (
            "sharegpt",
            {"conversations": said("human", "bot")},
            "from str 'bot'; allowed are human/user, gpt/assistant, system, tool/observation, "
            "function_call",
            "conversations[1].from",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": None}]},
            "field 'conversations[0].value' is null",
            "conversations[0].value",
        ),
        (
            "sharegpt",
            {"conversations": [*said("human"), {"from": "function_call", "value": "[1]"}]},
            "a function_call is JSON with 'name'",
            "conversations[1].value",
        ),
        (
            "sharegpt",
            {"conversations": said("system", "human", "gpt"), "system": "x"},
            "conversations[0] is a system turn too",
            "system",
        ),
    ],
)
def test_a_wrong_row_says_which_field_what_was_found_and_what_is_allowed(format, row, text, field):
    message, found_field = wrong(format, **row)
    assert text in message
    assert found_field == field


@pytest.mark.parametrize(
    ("turns", "number", "text"),
    [
        (("user", "system", "assistant"), 1, "a system turn that is not the first"),
        (("user", "user", "assistant"), 1, "two user turns in a row"),
        (("assistant", "user"), 0, "an assistant turn before any user turn"),
        (("system", "assistant"), 1, "an assistant turn before any user turn"),
        (("user", "tool", "assistant"), 1, "a tool turn that answers no assistant"),
        (("user", "assistant", "user"), 2, "the last turn is user"),
        (("system",), 0, "the last turn is system"),
    ],
)
def test_each_wrong_order_of_turns_has_its_own_message(turns, number, text):
    message, field = wrong("chat", messages=roles(*turns))
    assert message.startswith(f"messages[{number}]: {text}")
    assert field == f"messages[{number}]"


@pytest.mark.parametrize(
    "turns",
    [
        ("user", "assistant"),
        ("system", "user", "assistant", "user", "assistant"),
        ("user", "assistant", "tool", "tool", "assistant"),
        ("user", "assistant", "assistant"),
    ],
)
def test_orders_that_are_in_use_are_read(turns):
    assert len(read("chat", messages=roles(*turns)).messages) == len(turns)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": 1, "text": 2}, "chat"),
        ({"conversations": [{"from": 1}]}, "sharegpt"),
        ({"conversations": [{"role": 1}]}, "chat"),
        ({"conversations": "x"}, "sharegpt"),
        ({"instruction": 1, "input": 2, "output": 3, "text": 4}, "alpaca"),
        ({"prompt": 1, "completion": 2}, "completions"),
        ({"text": 1}, "text"),
        ({"prompt": 1, "answer": 2}, None),
        ({}, None),
    ],
)
def test_formats_are_recognised_by_their_fields(row, format):
    assert recognised(row) == format


@pytest.mark.parametrize("value", [0, False, [], {}])
def test_an_empty_value_of_the_wrong_type_is_no_missing_field(value):
    answer = {"conversations": said("human", "gpt")}
    assert wrong("alpaca", instruction="a", input=value, output="b")[1] == "input"
    assert wrong("sharegpt", system=value, **answer)[1] == "system"
    if value != []:
        assert wrong("sharegpt", tools=value, **answer)[1] == "tools"
    assert read("sharegpt", system=None, tools=None, **answer) == read("sharegpt", **answer)
    assert read("sharegpt", system="", tools="", **answer) == read("sharegpt", **answer)
