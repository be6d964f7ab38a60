"""PackedBatches: what is in a row, how full rows are, and documents that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from chat_templates import Bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text import PackedBatches, TextDataset
from mlx_fit.text.pack import best_fit


class Lengths:
    """A data set that is all lengths: document ``i`` holds ``i + 1`` over and over."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return np.full(self.lengths[index], index + 1), np.ones(self.lengths[index])

    def row_name(self, index):
        return f"document {index}"


def documents_in(batches):
    """Each document as it lies in its row: its tokens, targets and weights."""
    for batch in batches:
        for tokens, targets, weights, segments in zip(*batch, strict=True):
            for number in range(1, segments.max() + 1):
                where = segments == number
                assert np.ptp(np.flatnonzero(where)) == where.sum() - 1, "in one piece"
                yield tokens[where].tolist(), targets[where].tolist(), weights[where].tolist()


def test_a_row_holds_documents_one_after_the_other():
    rows = [([5, 6, 7], [0, 1, 1]), ([8, 9], [1, 1]), ([4, 4, 4, 4], [0, 0, 0, 1])]
    (batch,) = PackedBatches(rows, 2, 6, seed=0)
    assert batch.tokens.shape == (2, 6)
    assert batch.segments.max() == 2
    assert sorted(documents_in([batch])) == [
        ([4, 4, 4, 4], [4, 4, 4, 0], [0, 0, 1, 0]),
        ([5, 6, 7], [6, 7, 0], [1, 1, 0]),
        ([8, 9], [9, 0], [1, 0]),
    ]
    assert not batch.weights[batch.segments == 0].any()
    assert [part.dtype for part in batch] == [np.int32, np.int32, np.float32, np.int32]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_every_document_is_in_one_row_of_every_epoch(lengths, batch_size, seed):
    loader = PackedBatches(Lengths(lengths), batch_size, 16, seed=seed)
    expected = [
        ([i + 1] * n, [i + 1] * (n - 1) + [0], [1] * (n - 1) + [0]) for i, n in enumerate(lengths)
    ]
    for _ in range(3):
        batches = list(loader)
        assert sorted(documents_in(batches)) == expected
        assert [len(b.tokens) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert sum(len(batch.tokens) for batch in batches) == loader.num_rows
        assert len(batches) == len(loader)


@pytest.mark.parametrize("row_length", [2048, 8192])
def test_at_most_1_percent_of_the_positions_are_padding(rng, row_length):
    lengths = np.clip(rng.lognormal(5, 1, 30_000), 2, row_length).astype(int)
    loader = PackedBatches(Lengths(lengths), 8, row_length, seed=0)
    rows = sum(len(planned) for planned in loader._plan(1))
    assert 1 - lengths.sum() / (rows * row_length) == loader.waste < 0.01


def test_capacity_8192_and_8193_give_about_the_same_number_of_rows(rng):
    data = Lengths(rng.normal(4096, 512, 3000).astype(int))
    rows = [PackedBatches(data, 8, capacity).num_rows for capacity in (8192, 8193)]
    assert 1500 <= min(rows) <= max(rows) < 1530


def test_epochs_put_other_documents_together(rng):
    loader = PackedBatches(Lengths(rng.integers(3, 30, 400)), 4, 64, seed=0)
    pairs = []
    for _ in range(2):
        rows = [set(row[row > 0]) for batch in loader for row in batch.tokens]
        pairs.append({(a, b) for row in rows for a in row for b in row if a < b})
    assert len(pairs[0] & pairs[1]) < 0.2 * len(pairs[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10), max_size=40))
def test_best_fit_takes_the_fullest_row_with_room(lengths):
    lengths = np.array(lengths, int)
    found = best_fit(lengths, np.arange(len(lengths)), 10)
    # Which of two equally full rows it is does not matter: rows are compared by their fill.
    full, by_hand = (
        sorted(sum(lengths[row]) for row in rows) for rows in (found, best_fit_by_hand(lengths, 10))
    )
    assert full == by_hand


def best_fit_by_hand(lengths, capacity):
    rows = []
    for index, length in enumerate(lengths):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + length <= capacity]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[i] for i in row)).append(index)
        else:
            rows.append([index])
    return rows


# --- documents that are too long ------------------------------------------------------------------


def test_a_document_longer_than_a_row_raises_and_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "' + "b" * 38 + '"}\n')
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 3: 40 tokens, more than row_length=32"
    ) as e:
        PackedBatches(TextDataset(path, Bytes()), 2, 32)
    assert e.value.index == 1
    with pytest.raises(DataError, match=r"row 1: 3 tokens, .* 1 of 2 documents"):
        PackedBatches([([1], [1]), ([1] * 3, [1] * 3)], 2, 2)
    assert PackedBatches(TextDataset(path, Bytes()), 2, 40).num_overlong == 0


def test_documents_too_long_can_be_cut_or_dropped_and_are_counted():
    rows = [(np.arange(1, 4), np.ones(3)), (np.arange(10, 19), np.ones(9))]
    cut = PackedBatches(rows, 2, 4, overlong="truncate")
    assert sorted(tokens for tokens, *_ in documents_in(cut)) == [[1, 2, 3], [10, 11, 12, 13]]
    dropped = PackedBatches(rows, 2, 4, overlong="drop")
    assert [tokens for tokens, *_ in documents_in(dropped)] == [[1, 2, 3]]
    assert cut.num_overlong == dropped.num_overlong == 1
    with pytest.raises(DataError, match="No document is left: 2 of 2 are longer than row_length=2"):
        PackedBatches(rows, 2, 2, overlong="drop")


@pytest.mark.parametrize("length", range(1, 20))
def test_splitting_loses_no_target(length):
    mask = np.random.default_rng(length).integers(0, 2, length)
    loader = PackedBatches([(np.arange(1, length + 1), mask)], 3, 5, overlong="split", seed=0)
    learned = [
        target
        for _, targets, weights in documents_in(loader)
        for target, weight in zip(targets, weights, strict=True)
        if weight
    ]
    assert sorted(learned) == [i + 1 for i in range(1, length) if mask[i]]
    assert all(len(tokens) > 1 or length == 1 for tokens, *_ in documents_in(loader))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"row_length": 1}, "row_length=1; expected an integer of at least 2"),
        ({"overlong": "skip"}, "overlong='skip'; expected one of 'error', 'truncate'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_arguments_are_checked(options, text):
    with pytest.raises(ConfigurationError, match=text):
        PackedBatches([([1], [1])], **({"batch_size": 2, "row_length": 4} | options))
