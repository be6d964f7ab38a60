"""Rows of preferences in TRL's formats, and batches of them."""

from __future__ import annotations

import numpy as np
import pytest
from chat_templates import CHATML, Bytes, tokenizer_with

from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text import PreferenceBatches, PreferenceDataset, TextDataset

ROW = {"prompt": "2+2=", "chosen": "4", "rejected": "twenty"}
USER = {"role": "user", "content": "two and two?"}
GOOD, BAD = ({"role": "assistant", "content": c} for c in ("four", "five"))


def masked(tokens, mask):
    return tokens[mask == 1].tolist()


def test_a_pair_is_two_completions_of_one_prompt():
    pair = PreferenceDataset([ROW], Bytes())[0]
    for answer, (tokens, mask) in (("chosen", pair[:2]), ("rejected", pair[2:])):
        expected = TextDataset([{"prompt": ROW["prompt"], "completion": ROW[answer]}], Bytes())[0]
        np.testing.assert_array_equal(tokens, expected[0])
        np.testing.assert_array_equal(mask, expected[1])


CHATS = {
    "with a prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


@pytest.mark.parametrize("kind", CHATS)
def test_chats_may_have_a_prompt_or_begin_alike(kind):
    tokenizer = tokenizer_with(CHATML)
    pair = PreferenceDataset([CHATS[kind]], tokenizer)[0]
    for answer, (tokens, mask) in (("four", pair[:2]), ("five", pair[2:])):
        assert tokenizer.decode(masked(tokens, mask)) == f"{answer}<|im_end|>"


def test_only_the_last_answer_of_a_longer_chat_is_learned():
    before = [USER, {"role": "assistant", "content": "what?"}, USER]
    row = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    tokenizer = tokenizer_with(CHATML)
    pair = PreferenceDataset([row], tokenizer)[0]
    assert tokenizer.decode(masked(*pair[:2])) == "four<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' missing"),
        ({"chosen": "b", "rejected": "c"}, "field 'prompt' missing"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "expected a string"),
        ("text", "field 'chosen' missing"),
    ],
)
def test_bad_rows_are_told_by_place_or_counted(row, message):
    with pytest.raises(DataError, match=message):
        PreferenceDataset([ROW, row], Bytes())
    kept = PreferenceDataset([ROW, row], Bytes(), on_error="skip")
    assert (len(kept), kept.skipped.count) == (1, 1)


def test_a_file_is_read_and_its_line_told(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:2:1"):
        PreferenceDataset(path, Bytes())


def test_long_rows_are_cut_dropped_or_refused_and_counted():
    rows = [ROW, {"prompt": "a" * 20, "chosen": "b", "rejected": "c"}]
    cut = PreferenceDataset(rows, Bytes(), max_length=8)
    assert (len(cut), cut.cut.count, cut.dropped.count) == (1, 1, 1)
    assert cut.lengths.tolist() == [8]
    dropped = PreferenceDataset(rows, Bytes(), max_length=8, truncation="drop")
    assert (len(dropped), dropped.dropped.count) == (0, 2)
    with pytest.raises(DataError, match="more than max_length=8"):
        PreferenceDataset(rows, Bytes(), max_length=8, truncation="error")


def test_batches_hold_every_pair_once_and_go_on_from_a_state():
    rows = [dict(ROW, prompt="p" * n, chosen="c" * (n % 3 + 1)) for n in range(1, 12)]
    dataset = PreferenceDataset(rows, Bytes())
    loader = PreferenceBatches(dataset, 4, seed=3)
    batches = list(loader)
    lengths = [int(n) for batch in batches for n in batch.weights[:, 0].sum(-1)]
    assert sorted(lengths) == sorted(int(pair.chosen_mask.sum()) for pair in dataset)
    for batch in batches:
        at_targets = batch.weights[..., :-1] > 0
        assert (batch.targets[..., :-1][at_targets] == batch.tokens[..., 1:][at_targets]).all()
    assert len({b.tokens.shape for b in batches}) <= 32
    other = PreferenceBatches(dataset, 4, seed=3)
    first = next(iter(other))
    resumed = PreferenceBatches(dataset, 4, seed=3)
    resumed.load_state_dict(other.state_dict())
    rest = [first, *resumed]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(batches, rest, strict=True))


def test_a_reference_goes_with_its_rows():
    rows = [dict(ROW, prompt="p" * n) for n in range(1, 8)]
    dataset = PreferenceDataset(rows, Bytes())
    reference = np.stack([np.arange(1, 8), -np.arange(1, 8)], 1)
    for batch in PreferenceBatches(dataset, 3, seed=0, reference=reference):
        prompts = (batch.tokens[:, 0] == ord("p")).sum(-1)
        np.testing.assert_array_equal(batch.reference, np.stack([prompts, -prompts], 1))
    with pytest.raises(ConfigurationError, match=r"expected \(7, 2\)"):
        PreferenceBatches(dataset, 3, reference=reference[:3])


def test_an_empty_set_or_another_one_is_refused():
    with pytest.raises(DataError, match="empty"):
        PreferenceBatches(PreferenceDataset([ROW], Bytes(), max_length=3), 1)
    with pytest.raises(ConfigurationError, match="expected a PreferenceDataset"):
        PreferenceBatches([ROW], 1)
