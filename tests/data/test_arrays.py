"""What counts as an array, and how tensors of PyTorch become one."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_fit.data import ArrayDataset, DataLoader
from mlx_fit.data.arrays import is_array, to_numpy
from mlx_fit.data.collate import collate
from mlx_fit.errors import DataError

VALUES = [[1.5, -2.0], [0.25, 4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_whole_tensors_are_read_by_rows_whatever_their_dtype(dtype, needs_grad):
    x = torch.tensor(VALUES).to(dtype).requires_grad_(needs_grad)
    x_batch, y_batch = next(iter(DataLoader((x, torch.tensor([1, 2])), 2)))
    assert x_batch.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    np.testing.assert_array_equal(x_batch, VALUES)
    assert (y_batch.dtype, y_batch.tolist()) == (np.int64, [1, 2])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.nn.Parameter(torch.tensor(VALUES)),
        torch.tensor(VALUES).T.contiguous().T,
        torch.tensor(VALUES)[:, ::1].expand(2, 2),
        torch.view_as_complex(torch.tensor([[[1.5, 1.0]], [[0.25, -1.0]]])).conj().real,
    ],
    ids=["parameter", "transposed", "expanded", "negative view"],
)
def test_views_and_parameters_are_read(tensor):
    np.testing.assert_array_equal(to_numpy(tensor), tensor.detach().resolve_neg().numpy())


def test_the_conjugate_of_a_tensor_is_read():
    assert to_numpy(torch.tensor([1 + 2j]).conj()).tolist() == [1 - 2j]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 2, device="meta"), "on meta"),
        (torch.eye(3).to_sparse(), "sparse"),
    ],
    ids=["meta", "sparse"],
)
def test_tensors_without_plain_data_are_refused_by_name(tensor, message):
    with pytest.raises(DataError, match=f"y cannot be made an array: .*{message}") as caught:
        DataLoader((np.zeros((3, 2)), tensor))
    assert caught.value.field == "y"
    with pytest.raises(DataError, match=r"Row 4: field 'y' cannot be made an array"):
        collate([{"y": tensor}], [4])


def test_mlx_arrays_are_told_and_bfloat16_is_widened():
    array = mx.array(VALUES, mx.bfloat16)
    assert is_array(array)
    assert (to_numpy(array).dtype, to_numpy(array).tolist()) == (np.float32, VALUES)
    assert not any(map(is_array, (None, object(), {}, {"a": 1})))


def test_lists_of_bytes_and_strings_keep_every_character():
    column = [b"a\0", b"", "x\0"]
    assert ArrayDataset({"c": column}).__getitems__([0, 1, 2])["c"] == column
