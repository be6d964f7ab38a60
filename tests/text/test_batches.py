"""What a batch of token pieces holds, against putting it together token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fit.text import BucketBatches, PackedBatches
from mlx_fit.text.batches import text_batch
from mlx_fit.text.items import flat


class Rows:
    """The same rows as a list, asked for one by one."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def by_token(rows, batch, width):
    """The four arrays of a batch, whose rows are lists of (row, first, length), in plain loops."""
    found = np.zeros((4, len(batch), width))
    for i, pieces in enumerate(batch):
        column = 0
        for number, (row, first, length) in enumerate(pieces, 1):
            for k in range(first, first + length):
                found[0, i, column], found[3, i, column] = rows[row][0][k], number
                if k + 1 < first + length:
                    found[1, i, column] = rows[row][0][k + 1]
                    found[2, i, column] = rows[row][1][k + 1] != 0
                column += 1
    return found


document = st.integers(0, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 99), min_size=n, max_size=n),
        st.lists(st.sampled_from([0, 1, 2.5]), min_size=n, max_size=n),
    )
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(document, min_size=1, max_size=6))
def test_a_batch_is_what_plain_loops_put_together(data, rows):
    def piece(row):
        first = data.draw(st.integers(0, len(rows[row][0])))
        return row, first, data.draw(st.integers(0, len(rows[row][0]) - first))

    pieces = st.lists(st.integers(0, len(rows) - 1).map(piece), max_size=4)
    batch = data.draw(st.lists(pieces, min_size=1, max_size=4))
    width = max(1, *[sum(piece[2] for piece in row) for row in batch])
    flat_pieces = np.array([piece for row in batch for piece in row], int).reshape(-1, 3)
    row_of = np.repeat(np.arange(len(batch)), [len(row) for row in batch]).astype(int)
    expected = by_token(rows, batch, width)
    for source in (flat(rows), Rows(rows)):
        found = text_batch(source, flat_pieces, row_of, (len(batch), width))
        assert [part.dtype for part in found] == [np.int32, np.int32, np.float32, np.int32]
        np.testing.assert_array_equal(np.stack(found), expected)


@pytest.mark.parametrize(
    "loader", [lambda rows: BucketBatches(rows, 4, seed=1), lambda rows: PackedBatches(rows, 2, 16)]
)
def test_a_list_gives_the_batches_of_the_same_rows_one_by_one(loader):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 17, 50)
    rows = [(rng.integers(0, 9, n).tolist(), rng.integers(0, 2, n).tolist()) for n in lengths]
    one, other = loader(rows), loader(Rows(rows))
    other.seed = one.seed
    for left, right in zip(one, other, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
