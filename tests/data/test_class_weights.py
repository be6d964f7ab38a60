import mlx.core as mx
import numpy as np
import pytest

from mlx_fit.data.class_weights import ClassWeights
from mlx_fit.errors import ConfigurationError

X = np.zeros((4, 2))


@pytest.mark.parametrize(
    "y",
    [
        np.array([0, 1, 2, 1]),
        np.array([[0], [1], [2], [1]], dtype=np.uint8),
        np.array([0.1, 0.9, 2.2, 1.4], dtype=np.float32),
        np.eye(3)[[0, 1, 2, 1]],
        mx.array([0, 1, 2, 1]),
        [0, 1, 2, 1],
    ],
)
def test_rows_weigh_what_their_class_weighs(y):
    x, same, weights = ClassWeights({"1": 3, 0: 2})((X, y))
    assert x is X
    assert same is y
    assert weights.dtype == np.float32
    assert weights.tolist() == [2, 3, 1, 3]


def test_given_weights_are_multiplied():
    y, given = np.array([0, 1, 2, 1]), np.array([1.0, 0.5, 2.0, 0.0])
    weigh = ClassWeights({0: 2.0, 1: 4.0})
    assert weigh([X, y, given])[2].tolist() == [2, 2, 2, 0]
    per_step = weigh((X, y, np.stack([given, given], axis=1)))[2]
    assert per_step.tolist() == [[2, 2], [2, 2], [2, 2], [0, 0]]


def test_negative_classes_and_no_classes_are_fine():
    assert ClassWeights({-1: 0.0, 1: 5.0})((X, np.array([-1, 1, 0, 9])))[2].tolist() == [0, 5, 1, 1]
    assert ClassWeights({})((X, np.array([0, 1, 2, 3])))[2].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "class_weight",
    [
        {"a": 1},
        {1.5: 1},
        [1.0, 2.0],
        3,
        {0: "x"},
        {0: float("nan")},
        {0: float("inf")},
        {0: -1},
        {1: 2, "1": 3},
    ],
)
def test_what_is_no_weight_by_class_is_refused(class_weight):
    with pytest.raises(ConfigurationError, match="class_weight"):
        ClassWeights(class_weight)


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X,),
        (X, {"a": X, "b": X}),
        (X, (X[:, 0], X[:, 0])),
        (X, [X, X]),
        {"x": X},
        (X, np.zeros((4, 3, 2))),
    ],
)
def test_a_batch_without_a_single_y_of_labels_is_refused(batch):
    with pytest.raises(ConfigurationError, match="class_weight needs"):
        ClassWeights({0: 1.0})(batch)
