"""Rows of text from Parquet and Arrow, and from Hugging Face's datasets."""

import json

import pytest
from chat_templates import CHATML, tokenizer_with

from mlx_fit.text import TextDataset

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}", "name": None},
            {"role": "assistant", "content": "answer é" * (i + 1), "name": None},
        ],
        "score": None if i == 1 else i,
    }
    for i in range(7)
]


@pytest.fixture
def expected(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    return items(TextDataset(path, tokenizer_with(CHATML)))


def items(dataset):
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in dataset]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "table"])
def test_chats_of_a_table_are_those_of_the_jsonl_file(suffix, expected, tmp_path):
    source = table = pa.Table.from_pylist(ROWS)
    if suffix != "table":
        source = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, source, row_group_size=3)
    elif suffix == "arrow":
        with pa.ipc.new_file(source, table.schema) as writer:
            writer.write_table(table)
    dataset = TextDataset(source, tokenizer_with(CHATML))
    assert dataset.format == "chat"
    assert items(dataset) == expected


def test_chats_of_a_hugging_face_dataset_are_too(expected):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    assert items(TextDataset(rows, tokenizer_with(CHATML))) == expected
    assert items(TextDataset(rows.to_iterable_dataset(), tokenizer_with(CHATML))) == expected
