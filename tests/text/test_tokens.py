"""Flat tokens, in memory and in files, against the lists that went in."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_fit.text import tokens as module
from mlx_fit.text.tokens import TokenWriter, load


@pytest.mark.parametrize("flush", [1, 7, 1000])
@pytest.mark.parametrize("in_files", [True, False])
def test_documents_come_back_as_they_were(tmp_path, rng, monkeypatch, flush, in_files):
    monkeypatch.setattr(module, "_FLUSH", flush)
    writer = TokenWriter(tmp_path / "cache" if in_files else None)
    lengths = rng.integers(0, 12, 40)
    documents = [
        (rng.integers(0, 2**31, n).tolist(), rng.integers(0, 2, n).tolist()) for n in lengths
    ]
    for number, (tokens, mask) in enumerate(documents):
        writer.add(tokens, mask, 2 * number)
    store = writer.finish({"a": 1})
    assert [(t.tolist(), m.tolist()) for t, m in map(store.__getitem__, range(40))] == documents
    assert (store.numbers.tolist(), store.facts) == (list(range(0, 80, 2)), {"a": 1})
    assert (store.tokens.dtype, store.mask.dtype) == (np.int32, np.uint8)
    assert isinstance(store.tokens.base, np.memmap) == in_files


def test_no_documents_are_a_store_too(tmp_path):
    for folder in (None, tmp_path / "cache"):
        assert len(TokenWriter(folder).finish({})) == 0


def test_what_is_not_finished_is_not_found(tmp_path):
    writer = TokenWriter(tmp_path / "cache")
    writer.add([1], [1], 0)
    assert load(tmp_path / "cache") is None
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_writers_takes_what_the_first_wrote(tmp_path):
    writers = [TokenWriter(tmp_path / "cache") for _ in range(2)]
    for writer in writers:
        writer.add([1, 2], [0, 1], 0)
        assert writer.finish({})[0][0].tolist() == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
