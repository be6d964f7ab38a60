"""TextDataset: sources, policies, what is counted, the cache."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
from chat_templates import CHATML, Bytes, tokenizer_with

from mlx_fit.data import Subset, random_split
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text import TextDataset

HUNDRED = {"prompt": "p" * 100, "completion": "c" * 20}


class NoBos(Bytes):
    """One token per byte and an EOS at the end: lengths are easy to count."""

    def encode(self, text, add_special_tokens=False):
        return super().encode(text, add_special_tokens)


@pytest.fixture
def file(tmp_path):
    """A function that writes rows, or lines as they are, to ``train.jsonl``."""

    def write(*rows):
        path = tmp_path / "train.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), "utf-8")
        return path

    return write


def texts(dataset):
    return [bytes(tokens[:-1].tolist()).decode() for tokens, _ in dataset]


@pytest.mark.parametrize(
    "source",
    [
        [{"text": "one"}, {"text": "two"}],
        ["one", "two"],
        ({"text": text} for text in ("one", "two")),
        Subset([{"text": "two"}, {"text": "one"}], [1, 0]),
    ],
    ids=["dicts", "strings", "iterator", "dataset"],
)
def test_rows_in_memory(source):
    dataset = TextDataset(source, NoBos())
    assert texts(dataset) == ["one", "two"]
    assert (dataset.format, len(dataset), dataset.lengths.tolist()) == ("text", 2, [4, 4])


def test_rows_of_files(file, tmp_path):
    path = file({"text": "one"}, "", {"text": "two"})
    assert texts(TextDataset(path, NoBos())) == texts(TextDataset(str(path), NoBos()))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert texts(TextDataset(tmp_path / "a.txt", NoBos())) == ["one", "two"]


def test_items_are_int32_tokens_and_a_mask_and_cannot_be_changed():
    dataset = TextDataset(["abc"], NoBos())
    tokens, mask = dataset[-1]
    assert (tokens.dtype, mask.dtype) == (np.int32, np.uint8)
    assert (tokens.tolist(), mask.tolist()) == ([97, 98, 99, 257], [0, 1, 1, 1])
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    with pytest.raises(IndexError):
        dataset[1]


def test_a_dataset_can_be_split_and_sent_to_another_process(tmp_path):
    rows = ["one", "two", "three", "four"]
    for options in ({}, {"cache_dir": tmp_path}):
        dataset = TextDataset(rows, tokenizer_with(), **options)
        again = pickle.loads(pickle.dumps(dataset))
        assert [t.tolist() for t, _ in again] == [t.tolist() for t, _ in dataset]
        assert len(random_split(dataset, [0.5, 0.5])[0]) == 2


# --- errors ---------------------------------------------------------------------------------------


def test_a_bad_row_raises_with_its_place(file):
    path = file(*[{"text": "fine"}] * 16, '{"text": "fine", x}', {"text": "fine"})
    with pytest.raises(DataError, match="Expecting property name") as caught:
        TextDataset(path, NoBos())
    assert str(caught.value).startswith(f"{path}:17:18: ")


def test_a_row_of_another_format_is_an_error(file):
    path = file({"text": "fine"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r":2:1: field 'text' missing \(have: prompt, completion\)"):
        TextDataset(path, NoBos())


def test_bad_rows_can_be_skipped_and_are_counted(file, caplog):
    path = file({"text": "a"}, "{", "", {"text": 7}, "[]", {"text": "b"})
    with caplog.at_level(logging.WARNING, "mlx_fit.text"):
        dataset = TextDataset(path, NoBos(), on_error="skip")
    assert texts(dataset) == ["a", "b"]
    skipped = dataset.report().skipped
    assert (skipped.count, skipped.numbers) == (3, [2, 4, 5])
    assert "3 bad lines: 2, 4, 5" in str(dataset.report())
    assert f"{path}:4:1: field 'text' is int 7" in str(dataset.report())
    assert caplog.messages == [f"{path}: 2 of 5 rows; skipped: 3 (line 2, 4, 5)"]
    assert dataset.row_name(1) == f"{path}, line 6"


def test_one_bad_line_is_told_as_such(file):
    dataset = TextDataset(file(*[{"text": "a"}] * 16, "{"), NoBos(), on_error="skip")
    assert "1 bad line: 17" in str(dataset.report())


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ([], DataError, "no rows in the rows"),
        (
            [{"a": 1, "b": 2}],
            DataError,
            r"cannot be recognised .*\(have: a, b\). Known are chat: m",
        ),
        ([7], DataError, "row 0: found int 7; expected an object"),
        ([["x"]], DataError, "found list"),
        ({"text": "x"}, ConfigurationError, "source is a dict; expected the path"),
        (None, ConfigurationError, "source is a NoneType"),
        ({"a", "b"}, ConfigurationError, "source is a set; expected"),
        ("a\nb", ConfigurationError, "source is a text of several lines"),
        (b"train.jsonl", ConfigurationError, "source is a bytes"),
        ("no/such.jsonl", DataError, "no/such.jsonl: cannot be read"),
    ],
)
def test_a_source_that_gives_nothing_says_why(source, error, text):
    with pytest.raises(error, match=text):
        TextDataset(source, NoBos())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "csv"}, "format='csv'; expected one of 'auto', 'chat'"),
        ({"train_on": "first"}, "train_on='first'; expected one of 'completions', 'last', 'all'"),
        ({"truncation": True}, "truncation=True; expected one of 'truncate'"),
        ({"on_error": None}, "on_error=None; expected one of 'raise', 'skip'"),
        ({"max_length": 1}, "max_length=1; expected an integer of at least 2"),
        ({"max_length": 2.5}, "max_length=2.5"),
        ({"use_chat_template": 1}, "use_chat_template=1; expected"),
        ({"fields": {"question": "q"}}, "expected the name of a known field"),
        ({"cache_dir": "/dev/null/x"}, "cache_dir needs a tokenizer whose content can be hashed"),
    ],
)
def test_arguments_are_checked(options, text):
    with pytest.raises(ConfigurationError, match=text):
        TextDataset(["a"], NoBos(), **options)


def test_chats_need_a_chat_template():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ConfigurationError, match="has no chat_template"):
        TextDataset([row], tokenizer_with(None))
    with pytest.raises(ConfigurationError, match="has no apply_chat_template"):
        TextDataset([row], type("Plain", (), {"encode": lambda self, text: [1]})())


@pytest.mark.parametrize("tokenizer", [None, "gpt2", Bytes])
def test_a_tokenizer_is_an_object_with_encode(tokenizer):
    with pytest.raises(
        ConfigurationError, match=r"tokenizer is .*; expected an object with encode"
    ):
        TextDataset(["a"], tokenizer)


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "kept", "targets"), [(100, 0, 0), (110, 110, 10), (120, 120, 20), (121, 121, 21)]
)
def test_what_is_cut_ends_without_eos(max_length, kept, targets):
    dataset = TextDataset([HUNDRED], NoBos(), max_length=max_length)
    report = dataset.report()
    assert (report.tokens, report.target_tokens) == (kept, targets)
    if not kept:
        assert len(dataset) == 0
        assert (report.nothing_to_learn.numbers, report.dropped) == ([0], 1)
        return
    tokens, mask = dataset[0]
    assert mask.sum() == targets
    assert (tokens[-1] == NoBos.eos_token_id) == (max_length > 120)
    assert report.cut.tokens == 121 - kept


def test_long_rows_are_dropped_or_refused_by_policy(file):
    path = file({"prompt": "a", "completion": "b"}, "", HUNDRED)
    dataset = TextDataset(path, NoBos(), max_length=110, truncation="drop")
    assert (len(dataset), dataset.report().too_long.numbers) == (1, [3])
    with pytest.raises(DataError, match=":3:1: 121 tokens, more than max_length=110"):
        TextDataset(path, NoBos(), max_length=110, truncation="error")
    assert len(TextDataset(path, NoBos(), max_length=121, truncation="error")) == 2


def test_rows_with_nothing_to_learn_are_dropped_and_counted():
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}]
    dataset = TextDataset(rows, NoBos())
    assert (len(dataset), dataset.report().nothing_to_learn.numbers) == (1, [0])
    assert len(TextDataset(["", "a"], NoBos())) == 1


def test_fields_of_other_names():
    rows = [{"prompt": "x", "question": "a", "answer": "b"}]
    names = {"prompt": "question", "completion": "answer"}
    ((tokens, mask),) = TextDataset(rows, NoBos(), fields=names)
    assert (tokens.tolist(), mask.tolist()) == ([97, 98, 257], [0, 1, 1])


# --- the cache ------------------------------------------------------------------------------------


class Counted:
    """A tokenizer of transformers that counts what it encodes."""

    def __init__(self, template=None):
        self.inner = tokenizer_with(template)
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, *args, **kwargs):
        self.calls += 1
        return self.inner.encode(*args, **kwargs)


def test_the_same_content_is_tokenised_once(file, tmp_path):
    path, cache = file({"text": "one"}, {"text": "two"}, "{"), tmp_path / "cache"
    first = TextDataset(path, Counted(), on_error="skip", cache_dir=cache)
    other = path.rename(tmp_path / "renamed.jsonl")
    tokenizer = Counted()
    again = TextDataset(other, tokenizer, on_error="skip", cache_dir=cache)
    assert tokenizer.calls == 0
    assert isinstance(again.store.tokens.base, np.memmap)
    assert [t.tolist() for t, _ in again] == [t.tolist() for t, _ in first]
    assert again.report().skipped.numbers == [3]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change", ["rows", "tokenizer", "template", "max_length", "train_on", "fields", "options"]
)
def test_whatever_changes_the_tokens_is_tokenised_anew(file, tmp_path, change):
    rows = [{"text": "one two three"}]
    TextDataset(rows, Counted(), cache_dir=tmp_path)
    tokenizer = Counted(CHATML if change == "template" else None)
    if change == "rows":
        rows = [{"text": "one two four"}]
    if change == "tokenizer":
        tokenizer.inner.add_special_tokens({"extra_special_tokens": ["two"]})
    options = {
        "max_length": {"max_length": 3},
        "train_on": {"train_on": "all"},
        "fields": {"fields": {"prompt": "question"}},
        "options": {"template_options": {"a": 1}},
    }
    TextDataset(rows, tokenizer, cache_dir=tmp_path, **options.get(change, {}))
    assert tokenizer.calls > 0


@pytest.mark.parametrize("damage", ["facts.json", "tokens.bin", "mask.bin", "offsets.bin"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    first = TextDataset(["one", "two"], Counted(), cache_dir=tmp_path)
    expected = [tokens.tolist() for tokens, _ in first]
    (folder,) = tmp_path.iterdir()
    (folder / damage).write_bytes((folder / damage).read_bytes()[:-1])
    again = TextDataset(["one", "two"], Counted(), cache_dir=tmp_path)
    assert [tokens.tolist() for tokens, _ in again] == expected


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cache_dir='.*file' cannot be written"):
        TextDataset(["one"], Counted(), cache_dir=tmp_path / "file")


def test_a_failed_reading_leaves_no_cache(tmp_path):
    with pytest.raises(DataError):
        TextDataset(["one", {"text": 7}], Counted(), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
