"""Mutated rows: each gives tokens and a mask that is right, or a DataError with its place."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
from chat_templates import Bytes

from mlx_fit.errors import DataError
from mlx_fit.text import JsonLines, TextDataset
from mlx_fit.text.formats import FORMATS
from mlx_fit.text.masks import tokens_and_mask
from mlx_fit.text.rows import Place
from mlx_fit.text.tokenizer import Tokenizer

TURNS = ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
SPEAKERS = ["system", "human", "gpt", "user", "assistant", "observation", "function_call"]
CALL = '{"name": "f", "arguments": {"x": 1}}'
SEEDS = {
    "text": {"text": "hello"},
    "completions": {"prompt": "hello ", "completion": "world"},
    "alpaca": {"instruction": "say", "input": "", "output": "it"},
    "chat": {"messages": [{"role": role, "content": f"{role} says"} for role in TURNS]},
    "sharegpt": {
        "conversations": [
            {"from": speaker, "value": CALL if speaker == "function_call" else "words"}
            for speaker in SPEAKERS
        ]
    },
}
WORDS = [
    *("", " ", "x", "é日", "\ud800", "\0", "</s>", "<s>", "{% generation %}", "a" * 300),
    *("role", "content", "from", "value", "assistant", "user", "human", "gpt", "system", "tool"),
    *("weight", "tool_calls", "tools", "text", "messages", "function", "name", "arguments"),
]
VALUES = [None, True, 0, -1, 1.5, float("nan"), 10**30, [], {}, [[]], [None], {"a": []}, b"x"]
BYTES = [
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b":",
    b"\\",
    b"\xff",
    b"\0",
    b"\n",
    b"\\ud800",
    b"1e999",
    b" ",
]


class Marked(Bytes):
    """Writes what assistants say between 256 and 257, so that a right mask can be told."""

    def apply_chat_template(self, messages, add_generation_prompt=False, tools=None):
        ids = []
        for message in messages:
            said = [*message["content"].encode(), *str(message.get("tool_calls", "")).encode()]
            if message["role"] == "assistant":
                ids += [256, *said, 257]
            else:
                ids += [*message["role"].encode(), *said]
        return ids + [256] * add_generation_prompt


def expected_mask(tokens, format, train_on, prompt, row):
    """By looking at the tokens alone: what is after a 256, up to its 257."""
    if format == "text" or train_on == "all":
        return [0] + [1] * (len(tokens) - 1)
    if format in ("completions", "alpaca"):
        return [0] * prompt + [1] * (len(tokens) - prompt)
    messages = row.get("messages", row.get("conversations")) if format == "chat" else []
    turns = [turn for turn in messages if turn["role"] == "assistant"]
    counts = [turn.get("weight") != 0 for turn in turns]
    mask, inside, answers = [], False, 0
    for token in tokens:
        mask.append(int(inside and (not counts or counts[answers - 1])))
        answers += token == 256
        inside = token == 256 or (inside and token != 257)
    if train_on == "last":
        start = len(tokens) - tokens[::-1].index(256)
        mask[:start] = [0] * start
    return mask


def example_or_error(row, format, train_on, tokenizer, place):
    """What comes of a row: (example, tokens, mask), or its DataError."""
    try:
        example = FORMATS[format](row, place)
        return example, *tokens_and_mask(example, tokenizer, train_on, place)
    except DataError as error:
        return error


def mutated(row, rng):
    """A copy with one to three random changes anywhere in it."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        node, parents = row, [row]
        while isinstance(node, dict | list) and node and rng.random() < 0.8:
            parents.append(node)
            node = rng.choice(list(node.values()) if isinstance(node, dict) else node)
        parent = rng.choice(parents)
        if isinstance(parent, dict):
            change_dict(parent, rng)
        elif parent:
            change_list(parent, rng)
    return row


def anything(rng):
    return rng.choice(VALUES) if rng.random() < 0.5 else rng.choice(WORDS)


def change_dict(node, rng):
    key = rng.choice(list(node)) if node else rng.choice(WORDS)
    action = rng.randrange(4)
    if action == 0:
        node.pop(key, None)
    elif action == 1:
        node[rng.choice(WORDS)] = node.pop(key, None)
    elif action == 2:
        node[key] = anything(rng)
    else:
        node[rng.choice(WORDS)] = anything(rng)


def change_list(node, rng):
    at, action = rng.randrange(len(node)), rng.randrange(4)
    if action == 0:
        del node[at]
    elif action == 1:
        node.insert(at, copy.deepcopy(rng.choice(node)))
    elif action == 2:
        node[at] = anything(rng)
    else:
        other = rng.randrange(len(node))
        node[at], node[other] = node[other], node[at]


@pytest.mark.parametrize("format", SEEDS)
def test_mutated_rows_give_a_right_mask_or_an_error_with_a_field(format):
    rng, tokenizer, accepted = random.Random(format), Tokenizer(Marked()), 0
    for number in range(6000):
        row = mutated(SEEDS[format], rng)
        place = Place(number, "a.jsonl", number + 1)
        train_on = rng.choice(["completions", "last", "all"])
        found = example_or_error(row, format, train_on, tokenizer, place)
        if isinstance(found, DataError):
            assert (found.line, found.index, found.column) == (number + 1, number, 1), row
            assert found.field, (row, str(found))
            continue
        accepted += 1
        example, tokens, mask = found
        prompt = len(example[0].encode()) + 1 if format in ("completions", "alpaca") else 0
        if tokens:
            assert mask == expected_mask(tokens, format, train_on, prompt, row), row
    assert 500 < accepted < 5000


@pytest.mark.parametrize("format", SEEDS)
def test_mutated_lines_are_rows_or_errors_with_line_and_column(format, tmp_path):
    rng, path = random.Random(format), tmp_path / "a.jsonl"
    good = json.dumps(SEEDS[format]).encode()
    lines = []
    for _ in range(3000):
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.choice([0, 1, 1, 5, 60])] = rng.choice([b"", *BYTES])
        lines.append(bytes(line))
    path.write_bytes(b"\n".join([good, *lines]))
    whole = path.read_bytes().split(b"\n")
    rows, seen = JsonLines(path), []
    for index in range(len(rows)):
        place = rows.place(index)
        seen.append(place.line)
        try:
            expected = json.loads(whole[place.line - 1].decode())
            right = isinstance(expected, dict)
        except (ValueError, RecursionError):
            right = False
        if right:
            assert str(rows[index]) == str(expected)
        else:
            with pytest.raises(DataError) as caught:
                rows[index]
            assert caught.value.line == place.line
            assert 1 <= caught.value.column <= len(whole[place.line - 1]) + 1
    assert seen == [number for number, line in enumerate(whole, 1) if line.strip()]
    dataset = TextDataset(path, Marked(), format, on_error="skip")
    report = dataset.report()
    assert report.num_read == len(rows) == report.rows + report.skipped.count + report.dropped
    assert 50 < len(dataset) < 2900
    assert all(np.isin(mask, (0, 1)).all() and mask.any() for _, mask in dataset)
