"""Reading JSONL, against Python's own json and str.splitlines."""

from __future__ import annotations

import gzip
import json
import pickle

import numpy as np
import pytest

from mlx_fit.errors import DataError
from mlx_fit.text import JsonLines
from mlx_fit.text import jsonl as module
from mlx_fit.text.jsonl import LineFile, TextLines


@pytest.fixture
def file(tmp_path):
    """A function that writes bytes to ``train.jsonl``."""

    def write(data):
        path = tmp_path / "train.jsonl"
        path.write_bytes(data)
        return path

    return write


def test_rows_are_those_of_json_in_any_order(file):
    rows = [{"text": f"row {i} é"} for i in range(50)]
    read = JsonLines(file("\n".join(map(json.dumps, rows)).encode()))
    order = np.random.default_rng(0).permutation(50).tolist()
    assert [read[i] for i in order] == [rows[i] for i in order]
    assert read[-1] == rows[-1]
    with pytest.raises(IndexError):
        read[50]


def test_blank_lines_are_no_rows_yet_counted(file):
    read = JsonLines(file(b'\n{"a": 1}\n  \t\n\r\n{"a": 2}\n\n'))
    assert [read[i] for i in range(len(read))] == [{"a": 1}, {"a": 2}]
    assert [read.place(i).line for i in range(2)] == [2, 5]
    assert read.num_blank == 4


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_carriage_returns_and_last_newline_do_not_matter(file, bom, end):
    read = JsonLines(file(bom + b'{"a": 1}\r\n{"a": 2}' + end))
    assert [read[0], read[1], len(read)] == [{"a": 1}, {"a": 2}, 2]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b" \n\n"])
def test_a_file_without_rows_has_none(file, content):
    assert len(JsonLines(file(content))) == 0


def test_bad_json_names_line_and_column(file):
    lines = [b'{"text": "fine"}'] * 20
    lines[16] = b'{"text": "a" "b"}'
    path = file(b"\n".join(lines))
    with pytest.raises(DataError, match="Expecting ',' delimiter, near") as caught:
        JsonLines(path)[16]
    assert str(caught.value).startswith(f"{path}:17:14: ")
    error = caught.value
    assert (error.path, error.line, error.column, error.index) == (str(path), 17, 14, 16)


@pytest.mark.parametrize(
    ("line", "column", "text"),
    [
        (b'{"text": "\xff"}', 11, "byte 0xff is not UTF-8"),
        ('{"é": "'.encode() + b'\xff"}', 8, "byte 0xff is not UTF-8"),
        (b"[1, 2]", 1, r"found an array; expected a JSON object .*json\.load"),
        (b'"text"', 1, "found a string"),
        (b"null", 1, "found null"),
        (b"true", 1, "found a boolean"),
        (b"7", 1, "found a number"),
        (b"[", 2, r"json.load\(open\(path\)\)"),
        (b"[" * 100_000, 1, "cannot be read"),
        (b'{"n": ' + b"1" * 5000 + b"}", 1, "cannot be read"),
        (b'{"text": "no end', 10, "Unterminated string"),
    ],
)
def test_a_line_that_is_no_object_says_why(file, line, column, text):
    with pytest.raises(DataError, match=text) as caught:
        JsonLines(file(b"{}\n" + line))[1]
    assert (caught.value.line, caught.value.column) == (2, column)


def test_lines_are_found_across_the_parts_in_which_a_file_is_indexed(file, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    data = b"".join(b"x" * n + b"\n" for n in (1, 6, 7, 0, 8, 13, 14, 1))
    lines = LineFile(file(data))
    assert [lines[i] for i in range(len(lines))] == [x for x in data.split(b"\n") if x]
    assert lines.numbers.tolist() == [1, 2, 3, 5, 6, 7, 8]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing.jsonl: cannot be read: .*No such file"):
        JsonLines(tmp_path / "missing.jsonl")
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match="compressed with gzip; unpack it first"):
        JsonLines(packed)


def test_a_text_file_is_a_document_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n  two \nthree")
    lines = TextLines(path)
    assert [lines[i]["text"] for i in range(len(lines))] == ["one", "  two ", "three"]


def test_a_reader_can_be_sent_to_another_process(file):
    read = pickle.loads(pickle.dumps(JsonLines(file(b'{"a": 1}\n{"a": 2}'))))
    assert read[1] == {"a": 2}
