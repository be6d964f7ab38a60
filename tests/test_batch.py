"""What a batch is, and how it reaches the device."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_fit import DataError
from mlx_fit.batch import describe, num_rows, signature, to_mlx, unpack

X, Y, W = np.zeros((4, 3)), np.zeros(4, np.int64), np.ones(4, np.float32)


class Tokens(NamedTuple):
    """A batch of its own kind."""

    tokens: object
    weights: object


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_has_inputs_and_perhaps_targets_and_weights(kind):
    assert unpack(kind([X])) == (X, None, None)
    assert unpack(kind([X, Y]))[:2] == (X, Y)
    assert unpack(kind([X, Y, W]))[2] is W
    assert unpack(X).x is X
    assert unpack({"a": X}).x == {"a": X}


def test_a_batch_of_four_parts_is_refused():
    with pytest.raises(DataError, match=r"4 parts.*\(\(x1, x2\), y\)"):
        unpack((X, X, Y, W))


def test_a_named_tuple_is_a_batch_of_its_own_kind():
    batch = Tokens(X, W)
    assert unpack(batch).x is batch
    assert type(to_mlx(batch)) is Tokens


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", mx.float32),
        ("float32", mx.float32),
        ("float16", mx.float16),
        ("int64", mx.int64),
        ("int32", mx.int32),
        ("uint8", mx.uint8),
        ("bool", mx.bool_),
    ],
)
def test_float64_becomes_float32_and_everything_else_stays(dtype, expected):
    array = np.array([[1, 0, 1]], dtype)
    for found in (to_mlx(array), to_mlx((array,))[0], to_mlx({"a": [array]})["a"][0]):
        assert found.dtype == expected
        np.testing.assert_array_equal(np.array(found), array)


def test_containers_keep_their_kind():
    batch = to_mlx(({"a": X, "b": [X, (X,)]}, Y, None))
    assert isinstance(batch, tuple)
    assert isinstance(batch[0]["b"], list)
    assert isinstance(batch[0]["b"][1], tuple)
    assert batch[2] is None


def test_mlx_arrays_pass_as_they_are():
    array = mx.zeros(3, mx.bfloat16)
    assert to_mlx(array) is array
    assert to_mlx([array])[0] is array


def test_torch_tensors_are_taken():
    torch = pytest.importorskip("torch")
    found = to_mlx((torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2])))
    np.testing.assert_array_equal(np.array(found[0]), np.arange(6).reshape(2, 3))
    assert found[1].dtype == mx.int64


def test_views_and_other_byte_orders_keep_their_values():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array[::2, ::-1], array.T, array.astype(">f4"), np.asfortranarray(array)):
        np.testing.assert_array_equal(np.array(to_mlx((view,))[0]), view)


@pytest.mark.parametrize(
    "leaf",
    ["words", np.array(["a", "b"]), np.array([{}, 1], object), np.array(["2020-01-01"], "M8")],
    ids=["str", "strings", "objects", "dates"],
)
def test_what_is_not_numeric_is_refused(leaf):
    for batch in (leaf, (leaf, Y), {"a": leaf}):
        with pytest.raises(DataError, match="not numeric"):
            to_mlx(batch)


def test_the_signature_tells_apart_what_a_compiled_step_depends_on():
    batches = [
        (X, Y),
        [X, Y],
        (X, Y, W),
        (X[:2], Y[:2]),
        (X.astype(np.float16), Y),
        (X, Y.astype(np.int32)),
        {"a": X},
        {"b": X},
        Tokens(X, W),
        (X, W),
        X,
        ((X,), Y),
    ]
    keys = [signature(to_mlx(batch)) for batch in batches]
    assert len(set(keys)) == len(keys)
    assert signature(to_mlx((X + 1, Y + 1))) == keys[0]


def test_rows_are_those_of_the_first_array():
    assert num_rows((X, Y)) == num_rows({"a": {"b": X}}) == num_rows(Tokens(X, W)) == 4
    for batch in (mx.array(2.0), ((), None)):
        with pytest.raises(DataError, match="array of rows"):
            num_rows(batch)


def test_a_batch_is_described_by_names_shapes_and_dtypes():
    assert describe((X, Y, W)) == "x: (4, 3) float64, y: (4,) int64, weights: (4,) float32"
    assert describe(({"a": mx.array(X)}, [Y])) == "x.a: (4, 3) float32, y.0: (4,) int64"


def test_a_batch_of_any_kind_can_be_described():
    """A note on an error must not become another error."""
    for batch in ((X, X, Y, W), (), Tokens(X, W), X, {"a": X}):
        assert "(4" in describe(batch) or batch == ()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64", "int64", "bool"])
def test_torch_tensors_of_any_dtype_are_taken_as_they_are(name):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([[0.0, 1.0, 3.140625]]).to(getattr(torch, name)).T
    found = to_mlx((tensor,))[0]
    kept = {"float64": "float32", "bool": "bool"}.get(name, name)
    assert str(found.dtype) == f"mlx.core.{kept}"
    assert found.astype(mx.float32).tolist() == tensor.float().tolist()
    parameter = torch.nn.Parameter(torch.ones(2))  # needs gradients
    assert to_mlx(parameter).tolist() == [1, 1]
