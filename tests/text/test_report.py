"""The report, against counts made by hand."""

from __future__ import annotations

import numpy as np
from chat_templates import Bytes

from mlx_fit.text import TextDataset, TextReport


def test_a_report_counts_rows_tokens_and_targets():
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (1, 2, 5, 60, 0)]
    report = TextDataset(rows, Bytes(), max_length=40).report(batch_size=2)
    assert isinstance(report, TextReport)
    lengths = [5, 6, 9, 40]  # BOS, prompt, completion, EOS
    assert (report.num_read, report.rows, report.tokens) == (5, 4, sum(lengths))
    assert report.target_tokens == sum(lengths) - 4 * 3
    assert (report.min_length, report.max_length, report.median_length) == (5, 40, 7.5)
    assert report.histogram == [(4, 8, 2), (8, 16, 1), (16, 32, 0), (32, 64, 1)]
    assert (report.cut.count, report.cut.numbers, report.cut.tokens) == (1, [3], 24)
    assert (report.nothing_to_learn.numbers, report.dropped) == ([4], 1)


def test_padding_before_and_after():
    rows = ["x" * n for n in np.random.default_rng(0).lognormal(3, 1, 500).astype(int) + 1]
    report = TextDataset(rows, Bytes()).report(batch_size=8, max_shapes=16)
    assert 0.5 < report.padding_random < 0.8
    assert report.padding_bucketed < 0.2
    assert report.shapes <= 16
    whole = TextDataset(rows, Bytes()).report(batch_size=500)
    lengths = np.array([len(row) + 2 for row in rows])
    assert np.isclose(whole.padding_random, 1 - lengths.mean() / lengths.max())


def test_a_report_is_readable():
    rows = ["a", "bb", "c" * 30, ""]
    text = str(TextDataset(rows, Bytes(), max_length=10).report(batch_size=2))
    assert text.splitlines() == [
        "the rows: 3 of 4 rows, 17 tokens, 14 of them targets",
        "tokens a row: 3 to 10, mean 5.7, median 4",
        "   2 to  3  1  ########################################",
        "   4 to  7  1  ########################################",
        "   8 to 15  1  ########################################",
        "cut to max_length: 1 row (row 2); 22 tokens lost",
        "dropped, nothing to learn: 1 row (row 3)",
        "padding in batches of 2: 29.2% in random order, 5.6% by length (2 shapes)",
    ]


def test_a_report_without_rows_says_so():
    report = TextDataset([""], Bytes()).report()
    assert (report.rows, report.histogram, report.mean_length) == (0, [], 0.0)
    assert "0 of 1 rows" in str(report)


def test_only_the_first_lines_are_kept_but_all_are_counted():
    skipped = TextDataset([7] * 30 + ["a"], Bytes(), "text", on_error="skip").report().skipped
    assert (skipped.count, len(skipped.numbers), len(skipped.messages)) == (30, 20, 20)
    assert skipped.listed().endswith("18, 19 and 10 more")
