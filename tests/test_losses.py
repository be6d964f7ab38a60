"""Losses against PyTorch, and what must hold where a label does not count."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from mlx_fit import losses
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.losses import NLL, BinaryCrossEntropy, CrossEntropy, Huber, KLDiv, Loss, SmoothL1

SHAPES = [(7,), (5, 3), (4, 2, 3)]
INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def value_and_gradient(loss, outputs, targets):
    """Losses, and the gradient of their mean by the outputs."""
    outputs, targets = mx.array(outputs), mx.array(targets)
    gradient = mx.grad(lambda x: loss(x, targets).mean())(outputs)
    return np.array(loss(outputs, targets)), np.array(gradient)


def torch_value_and_gradient(function, outputs):
    x = torch.tensor(outputs, requires_grad=True)
    values = function(x)
    values.mean().backward()
    return values.detach().numpy(), x.grad.numpy()


def assert_same(loss, outputs, targets, reference):
    ours, theirs = (
        value_and_gradient(loss, outputs, targets),
        torch_value_and_gradient(reference, outputs),
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-6)


def normal(seed, shape, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def log_softmax(x):
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


# --- Element by element --------------------------------------------------------------------------

REGRESSION = {
    "mse": (losses.get("mse"), F.mse_loss, {}),
    "l1": (losses.get("l1"), F.l1_loss, {}),
    "mae": (losses.get("mae"), F.l1_loss, {}),
    "smooth_l1": (losses.get("smooth_l1"), F.smooth_l1_loss, {}),
    "smooth_l1 0.3": (SmoothL1(beta=0.3), F.smooth_l1_loss, {"beta": 0.3}),
    "smooth_l1 0": (SmoothL1(beta=0), F.smooth_l1_loss, {"beta": 0.0}),
    "huber": (losses.get("huber"), F.huber_loss, {}),
    "huber 0.3": (Huber(delta=0.3), F.huber_loss, {"delta": 0.3}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", REGRESSION)
def test_regression_losses_are_those_of_pytorch(case, shape):
    loss, function, parameters = REGRESSION[case]
    outputs, targets = normal(0, shape), normal(1, shape)
    reference = torch.tensor(targets)
    assert_same(
        loss, outputs, targets, lambda x: function(x, reference, reduction="none", **parameters)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_binary_cross_entropy_takes_logits_as_bce_with_logits_does(pos_weight, shape):
    outputs = normal(0, shape, scale=20)
    targets = np.random.default_rng(1).random(shape, np.float32)
    assert_same(
        BinaryCrossEntropy(pos_weight),
        outputs,
        targets,
        lambda x: F.binary_cross_entropy_with_logits(
            x, torch.tensor(targets), pos_weight=torch.tensor(pos_weight), reduction="none"
        ),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_hinge_and_log_cosh_are_their_definitions(shape):
    outputs, targets = normal(0, shape), normal(1, shape)
    signs = torch.tensor(np.sign(targets))
    assert_same(
        losses.get("hinge"), outputs, np.sign(targets), lambda x: (1 - x * signs).clamp(min=0)
    )
    assert_same(
        losses.get("log_cosh"),
        outputs,
        targets,
        lambda x: torch.log(torch.cosh((x - torch.tensor(targets)).double())).float(),
    )


def test_log_cosh_of_a_huge_error_is_finite():
    assert losses.get("log_cosh")(mx.array([1e4]), mx.array([0.0])).item() == pytest.approx(
        1e4 - np.log(2)
    )


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "huber", "binary_cross_entropy"])
@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float16"])
def test_targets_are_converted_to_the_dtype_of_the_outputs(name, dtype):
    loss, outputs = losses.get(name), mx.array(normal(0, (6,)))
    targets = np.array([0, 1, 1, 0, 1, 0])
    converted = loss(outputs, mx.array(targets.astype(dtype)))
    assert converted.dtype == mx.float32
    assert mx.array_equal(converted, loss(outputs, mx.array(targets.astype(np.float32))))


# --- Over an axis --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4)])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_is_pytorchs_summed_over_the_last_axis(log_target, shape):
    outputs, targets = log_softmax(normal(0, shape)), np.exp(log_softmax(normal(1, shape)))
    targets[0] = np.eye(4)[0]
    given = np.log(targets + 1e-6) if log_target else targets
    assert_same(
        KLDiv(log_target),
        outputs,
        given,
        lambda x: F.kl_div(x, torch.tensor(given), reduction="none", log_target=log_target).sum(-1),
    )


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4)])
def test_cosine_similarity_is_one_less_pytorchs_even_at_a_zero_vector(shape):
    outputs, targets = normal(0, shape), normal(1, shape)
    outputs[0] = 0
    assert_same(
        losses.get("cosine_similarity"),
        outputs,
        targets,
        lambda x: 1 - F.cosine_similarity(x, torch.tensor(targets), dim=-1),
    )


# --- Class indices -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(8, 5), (4, 6, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [None, -100, 3])
def test_cross_entropy_is_pytorchs(dtype, shape, smoothing, ignore_index):
    outputs = normal(0, shape)
    targets = np.random.default_rng(1).integers(0, 5, shape[:-1])
    if ignore_index == -100 and dtype.startswith("i"):
        targets.flat[::3] = -100
    reference = torch.tensor(targets)
    ignored = -999 if ignore_index is None else ignore_index
    assert_same(
        CrossEntropy(ignore_index, smoothing),
        outputs,
        targets.astype(dtype),
        lambda x: F.cross_entropy(
            x.movedim(-1, 1),
            reference,
            ignore_index=ignored,
            label_smoothing=smoothing,
            reduction="none",
        ),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_cross_entropy_takes_probabilities_and_one_hot_rows(dtype, smoothing):
    outputs, targets = normal(0, (6, 5)), np.exp(log_softmax(normal(1, (6, 5))))
    if dtype == "int32":
        targets = np.eye(5, dtype=np.int32)[targets.argmax(1)]
    assert_same(
        CrossEntropy(label_smoothing=smoothing),
        outputs,
        targets,
        lambda x: F.cross_entropy(
            x, torch.tensor(targets).float(), label_smoothing=smoothing, reduction="none"
        ),
    )


@pytest.mark.parametrize("shape", [(8, 5), (4, 6, 5)])
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_nll_is_pytorchs(dtype, shape):
    outputs = log_softmax(normal(0, shape))
    targets = np.random.default_rng(1).integers(0, 5, shape[:-1])
    if dtype == "int64":
        targets.flat[::3] = -100
    assert_same(
        NLL(),
        outputs,
        targets.astype(dtype),
        lambda x: F.nll_loss(x.movedim(-1, 1), torch.tensor(targets), reduction="none"),
    )


@pytest.mark.parametrize("loss", [CrossEntropy(10**6), NLL(10**6)])
def test_an_ignored_label_gives_exactly_zero_and_no_gradient(loss):
    values, gradient = value_and_gradient(loss, normal(0, (4, 3)), [0, 10**6, 2, 10**6])
    assert values[[1, 3]].tolist() == [0, 0]
    assert not gradient[[1, 3]].any()
    assert gradient[[0, 2]].any(1).all()


def test_a_batch_without_a_counting_label_is_all_zero():
    values, gradient = value_and_gradient(CrossEntropy(), normal(0, (4, 3)), [-100] * 4)
    assert not values.any()
    assert not gradient.any()


def test_ignore_index_255_works_in_uint8_and_minus_100_ignores_nothing_there():
    outputs, targets = mx.zeros((3, 200)), mx.array([0, 156, 255], mx.uint8)
    ignored = CrossEntropy(ignore_index=255)(outputs, targets)
    assert ignored[2].item() == 0
    assert CrossEntropy(-100).mask(targets) is None
    assert CrossEntropy(-100)(outputs, targets)[1].item() == pytest.approx(np.log(200))


def test_a_column_of_class_labels_is_a_row_of_losses():
    outputs, targets = mx.array(normal(0, (4, 3))), mx.array([0, -100, 2, 1])
    column = CrossEntropy()(outputs, targets[:, None])
    assert mx.array_equal(column, CrossEntropy()(outputs, targets))
    assert CrossEntropy().mask(targets[:, None], outputs).tolist() == [1, 0, 1, 1]


def test_bool_labels_are_classes_0_and_1():
    outputs = mx.array(normal(0, (4, 2)))
    targets = mx.array([True, False, True, True])
    expected = CrossEntropy()(outputs, targets.astype(mx.int32))
    assert mx.array_equal(CrossEntropy()(outputs, targets), expected)


def test_the_mask_is_none_where_nothing_can_be_ignored():
    labels = mx.array([0, 1])
    assert CrossEntropy(None).mask(labels) is None
    assert CrossEntropy().mask(mx.array([0.0, 1.0])) is None
    assert losses.get("mse").mask(labels) is None
    one_hot = mx.array([[0, 1], [1, 0]])
    assert CrossEntropy().mask(one_hot, mx.zeros((2, 2))) is None
    assert CrossEntropy().mask(labels, mx.zeros((2, 2))).dtype == mx.float32


def test_any_loss_can_ignore_an_integer_target():
    loss = Loss("squares", lambda x, y: mx.square(x - y[:, None]), ignore_index=-1)
    assert loss(mx.ones((3, 1)), mx.array([3, -1, 0])).tolist() == [[4], [0], [1]]


def test_a_reduced_loss_cannot_ignore_a_target():
    loss = Loss("mean", lambda x, y: mx.square(x - y).mean(), ignore_index=-1)
    with pytest.raises(ConfigurationError, match="one loss per target"):
        loss(mx.ones(3), mx.array([3, -1, 0]))


# --- Bit for bit ---------------------------------------------------------------------------------


def test_training_is_bit_identical_to_mlx_cross_entropy():
    def train(loss):
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.relu, nn.Linear(32, 10))
        optimizer = optim.SGD(0.1)
        mx.eval(model.state)
        gradient = nn.value_and_grad(model, lambda m, x, y: mx.mean(loss(m(x), y)))

        def step(x, y):
            value, gradients = gradient(model, x, y)
            optimizer.update(model, gradients)
            return value, gradients["layers"][0]["weight"]

        step = mx.compile(step, inputs=model.state, outputs=model.state)
        rng, seen = np.random.default_rng(0), []
        for size in rng.integers(1, 70, 50):
            x, y = rng.normal(size=(size, 20)).astype(np.float32), rng.integers(0, 10, size)
            seen += [np.array(a).tobytes() for a in step(mx.array(x), mx.array(y))]
        return seen

    assert train(CrossEntropy()) == train(nn.losses.cross_entropy)


def test_every_loss_compiles():
    def all_losses(outputs, targets):
        return [losses.get(name)(outputs, targets) for name in NAMES if name != "nll"]

    outputs, targets = mx.array(normal(0, (5, 3))), mx.array(np.exp(normal(1, (5, 3))))
    for mine, eager in zip(
        mx.compile(all_losses)(outputs, targets), all_losses(outputs, targets), strict=True
    ):
        np.testing.assert_allclose(mine, eager, rtol=1e-6)


# --- Shapes --------------------------------------------------------------------------------------

ALIGNED = ["mse", "l1", "smooth_l1", "huber", "log_cosh", "hinge", "binary_cross_entropy"]


@pytest.mark.parametrize("name", ALIGNED)
def test_a_column_and_a_row_do_not_broadcast(name):
    loss, outputs, targets = losses.get(name), normal(0, (5, 1)), np.sign(normal(1, (5,)))
    expected = np.array(loss(mx.array(outputs[:, 0]), mx.array(targets)))
    assert loss(mx.array(outputs), mx.array(targets)).shape == (5, 1)
    np.testing.assert_array_equal(loss(mx.array(outputs), mx.array(targets))[:, 0], expected)
    np.testing.assert_array_equal(
        loss(mx.array(outputs[:, 0]), mx.array(targets[:, None])), expected
    )


@pytest.mark.parametrize("name", [*ALIGNED, "kl_div", "cosine_similarity"])
@pytest.mark.parametrize("shapes", [((5, 3), (5,)), ((5,), (1,)), ((5, 3), (1, 3)), ((4, 1), (5,))])
def test_other_shapes_are_refused_with_both(name, shapes):
    with pytest.raises(DataError) as caught:
        losses.get(name)(mx.zeros(shapes[0]), mx.zeros(shapes[1]))
    assert str(shapes[0]) in str(caught.value)
    assert str(shapes[1]) in str(caught.value)


@pytest.mark.parametrize("name", ["cross_entropy", "nll"])
@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((5, 3), (4,)), ((5, 3), (5, 2)), ((2, 4, 3), (2, 3)), ((5, 1), (5,)), ((5, 1), (5, 1)),
     ((5,), (5,))],
)  # fmt: skip
def test_class_labels_of_another_shape_are_refused(name, outputs, targets):
    with pytest.raises(DataError) as caught:
        losses.get(name)(mx.zeros(outputs), mx.zeros(targets, mx.int32))
    assert str(outputs) in str(caught.value)


def test_the_mask_of_labels_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"\(5, 3\).*\(4,\)"):
        CrossEntropy().mask(mx.array([0, 1, 2, 0]), mx.zeros((5, 3)))


def test_floating_point_class_labels_are_refused():
    with pytest.raises(DataError, match=r"float32.*integers"):
        CrossEntropy()(mx.zeros((3, 4)), mx.array([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("dtype", [mx.bool_, mx.uint8])
def test_hinge_refuses_targets_that_cannot_be_minus_one(dtype):
    with pytest.raises(DataError, match="-1 and 1"):
        losses.get("hinge")(mx.zeros(2), mx.array([0, 1]).astype(dtype))


# --- The check on the host -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_check_counts_the_labels_that_count(dtype):
    labels = np.array([[0, 1, 2], [4, 4, 0]], dtype)
    assert CrossEntropy().check(labels, 5) == 6
    assert CrossEntropy(ignore_index=4).check(labels, 5) == 4
    assert CrossEntropy(ignore_index=4).check(labels, 4) == 4
    assert CrossEntropy(ignore_index=None).check(labels, 5) == 6


def test_the_check_names_the_label_its_place_and_what_is_allowed():
    labels = np.array([[0, -100], [1, 2], [0, 7], [9, 9]])
    with pytest.raises(DataError) as caught:
        CrossEntropy().check(labels, 5)
    assert caught.value.field == "targets"
    assert caught.value.index == 2
    for fact in ("targets[2, 1] is 7", "from 0 to 4", "ignore_index=-100", "at least 8 outputs"):
        assert fact in str(caught.value)


@pytest.mark.parametrize("label", [-1, 5, 100_000])
@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(None), NLL()])
def test_a_label_out_of_range_is_refused(loss, label):
    with pytest.raises(DataError, match=rf"targets\[1\] is {label}"):
        loss.check(np.array([-100 if loss.ignore_index else 0, label, 4]), 5)


def test_before_the_number_of_classes_is_known_only_negative_labels_are_refused():
    assert CrossEntropy().check(np.array([0, 1000, -100]), None) == 2
    with pytest.raises(DataError, match="from 0 up"):
        CrossEntropy().check(np.array([0, -1]), None)


def test_an_empty_batch_counts_nothing():
    assert CrossEntropy().check(np.zeros(0, np.int64), 5) == 0


def test_class_labels_are_told_from_one_hot_rows():
    outputs, one_hot = mx.zeros((2, 2)), mx.array([[0, 1], [1, 0]])
    assert CrossEntropy().is_labels(np.array([0, 1]))
    assert CrossEntropy().is_labels(mx.array([0, 1]), outputs)
    assert not CrossEntropy().is_labels(one_hot, outputs)
    assert not CrossEntropy().is_labels(np.array([0.0, 1.0]))
    assert not losses.get("mse").is_labels(np.array([0, 1]))


# --- Names and parameters ------------------------------------------------------------------------

NAMES = [
    "cross_entropy", "nll", "binary_cross_entropy", "mse", "l1", "smooth_l1", "huber", "kl_div",
    "hinge", "log_cosh", "cosine_similarity",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_loss_of_that_name(name):
    assert losses.get(name).name == name


def test_mae_is_l1_and_cross_entropy_ignores_pytorchs_label():
    assert losses.get("mae") is losses.get("l1")
    assert losses.get("cross_entropy").ignore_index == -100
    assert losses.get("nll").ignore_index == -100


def test_a_function_and_a_loss_are_taken_as_they_are():
    def own(outputs, targets):
        return (outputs - targets).sum(-1)

    loss = losses.get(own)
    assert (loss.name, loss.ignore_index, loss.class_indices) == ("own", None, False)
    assert loss(mx.ones((2, 3)), mx.zeros((2, 3))).tolist() == [3, 3]
    assert losses.get(loss) is loss


def test_an_unknown_name_lists_the_known_ones_and_a_guess():
    with pytest.raises(ConfigurationError) as caught:
        losses.get("crossentropy")
    assert "Did you mean 'cross_entropy'?" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(ConfigurationError, match=r"unknown\. Known"):
        losses.get("zzz")


@pytest.mark.parametrize("spec", [3, None, ["mse"]])
def test_anything_else_is_refused(spec):
    with pytest.raises(ConfigurationError, match=type(spec).__name__):
        losses.get(spec)


def test_a_factory_that_was_not_called_is_refused():
    with pytest.raises(ConfigurationError, match=r"write loss=CrossEntropy\(\)"):
        losses.get(CrossEntropy)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossEntropy(label_smoothing=1.0),
        lambda: CrossEntropy(label_smoothing=-0.1),
        lambda: Huber(delta=0),
        lambda: SmoothL1(beta=-1),
        lambda: BinaryCrossEntropy(pos_weight=0),
    ],
)
def test_a_parameter_out_of_range_is_refused(make):
    with pytest.raises(ConfigurationError):
        make()
