from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_fit.data.collate import collate
from mlx_fit.errors import DataError


class Pair(NamedTuple):
    left: object
    right: object


def test_rows_are_stacked_in_their_structure():
    rows = [{"x": np.full(3, i), "p": Pair(i, (float(i), [mx.array(i)]))} for i in range(4)]
    batch = collate(rows)
    assert batch["x"].tolist() == [[i] * 3 for i in range(4)]
    assert isinstance(batch["p"], Pair)
    assert batch["p"].left.tolist() == [0, 1, 2, 3]
    assert isinstance(batch["p"].right, tuple)
    assert batch["p"].right[1][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "rows",
    [[1, 2], [True, False], [np.uint8(1), np.uint8(2)], [np.int32([1]), np.int32([2])],
     [torch.tensor([1]), torch.tensor([2])], [np.float16(1), np.float16(2)],
     [np.float32([1.5]), np.float32([2])], [np.int64(1), np.int64(2)], [True, 2]],
)  # fmt: skip
def test_dtypes_are_those_of_torch(rows):
    batch = collate(rows)
    expected = torch.utils.data.default_collate(rows).numpy()
    assert batch.dtype == expected.dtype
    assert batch.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "rows", [[1.5, 2], [np.float64(1), np.float64(2)], [np.ones(2), np.zeros(2)]]
)
def test_float64_becomes_float32(rows):
    assert collate(rows).dtype == np.float32


def test_mlx_bfloat16_becomes_float32():
    row = mx.array([0.5], dtype=mx.bfloat16)
    assert collate([row, row]).dtype == np.float32


def test_lists_of_numbers_are_arrays_and_strings_are_lists():
    batch = collate([{"ids": [1, 2], "text": "a"}, {"ids": [3, 4], "text": "b"}])
    assert batch["ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["text"] == ["a", "b"]


def test_a_shape_clash_names_path_index_and_shapes():
    rows = [{"image": (np.zeros((2, 3)), 0)}, {"image": (np.zeros((2, 4)), 1)}]
    with pytest.raises(DataError) as caught:
        collate(rows, indices=[37, 12])
    assert "Row 12: field 'image.0' has shape (2, 4), but in row 37 it has shape (2, 3)" in str(
        caught.value
    )
    assert (caught.value.field, caught.value.index) == ("image.0", 12)


@pytest.mark.parametrize(
    ("second", "found"),
    [({"x": 1}, r"keys \['x'\]"), ({"x": 1, "z": 2}, r"keys \['x', 'z'\]"), (3, "a int")],
)
def test_differing_keys_name_row_and_keys(second, found):
    with pytest.raises(DataError, match=rf"Row 5: the row has .*{found}.* row 4 .*\['x', 'y'\]"):
        collate([{"x": 1, "y": 2}, second], indices=[4, 5])


@pytest.mark.parametrize(
    ("first", "second"), [((1, 2), (1, 2, 3)), ("a", 1), (1, "a"), (1, None), ([1, 2], [1, 2, 3])]
)
def test_rows_of_different_kind_are_refused(first, second):
    with pytest.raises(DataError, match="Row 1"):
        collate([first, second])


@pytest.mark.parametrize("row", [None, object(), [[1], [2, 3]], 2**70])
def test_what_cannot_be_stacked_is_named(row):
    with pytest.raises(DataError, match="Row 9: field 'x'") as caught:
        collate([{"x": row}], indices=[9])
    assert caught.value.index == 9


def test_bfloat16_tensors_and_tensors_with_gradients_become_float32():
    rows = [torch.tensor([0.5, 3.140625], dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(2))]
    batch = collate(rows)
    assert batch.dtype == np.float32
    assert batch.tolist() == [[0.5, 3.140625], [1, 1]]
