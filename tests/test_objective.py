"""Objectives: what is minimised and counted, for one output and several, against NumPy."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import ConfigurationError, DataError, Sums, Supervised, Trainer
from mlx_fit.losses import CrossEntropy
from mlx_fit.objective import as_objective
from mlx_fit.weighting import mean_loss


def linear(rng, num_outputs=1):
    model = nn.Linear(4, num_outputs, bias=False)
    model.weight = mx.array(rng.normal(size=(num_outputs, 4)), mx.float32)
    return model


def rows(rng, n=12):
    return rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(n, 1)).astype(np.float32)


def evaluate(model, batches, *args, **kwargs):
    return Trainer(model, optim.SGD(0.1), *args, **kwargs).evaluate(batches, verbose=0)


def squared_errors(model, x, y):
    return ((x @ np.array(model.weight).T - y) ** 2).mean(-1)


# --- functions ------------------------------------------------------------------------------------


def test_a_scalar_objective_weighs_its_rows(rng):
    model, (x, y) = linear(rng), rows(rng)

    def objective(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    found = evaluate(model, [(x[:8], y[:8]), (x[8:], y[8:])], objective=objective)
    assert found == {"loss": pytest.approx(squared_errors(model, x, y).mean(), rel=1e-6)}


def test_a_scalar_objective_may_name_further_values(rng):
    model, (x, y) = linear(rng), rows(rng)

    def objective(model, batch):
        error = model(batch[0]) - batch[1]
        return error.square().mean(), {"bias": error.mean(), "constant": 3}

    found = evaluate(model, [(x[:8], y[:8]), (x[8:], y[8:])], objective=objective)
    errors = x @ np.array(model.weight).T - y
    assert found["bias"] == pytest.approx(errors.mean(), rel=1e-5)
    assert found["constant"] == 3
    assert set(found) == {"loss", "bias", "constant"}


@pytest.mark.parametrize("ends", [[], [3, 4, 9]], ids=["one batch", "a window"])
def test_sums_are_divided_once_by_their_own_weight(ends, rng):
    """Also in training: the micro-batches of a window are the big batch."""
    x, y = rows(rng)
    weights = rng.random(12).astype(np.float32)
    weights[3] = 0  # a micro-batch by itself

    def objective(model, batch):
        x, y, weights = batch
        losses = (model(x) - y).square().mean(-1)
        return Sums(
            (losses * weights).sum(), weights.sum(), {"mae": (abs(model(x) - y).sum(), len(x))}
        )

    model = linear(rng)
    start = np.array(model.weight, np.float64)
    errors = x @ start.T - y
    trainer = Trainer(
        model, optim.SGD(0.1), objective=objective, gradient_accumulation=len(ends) + 1
    )
    batches = list(zip(*(np.split(a, ends) for a in (x, y, weights)), strict=True))
    history = trainer.fit(batches, verbose=0).history
    gradient = 2 * (weights[:, None] * errors * x).sum(0) / weights.sum()
    np.testing.assert_allclose(np.array(model.weight), start - 0.1 * gradient, rtol=1e-4)
    assert history["loss"] == pytest.approx(
        [np.average(errors[:, 0] ** 2, weights=weights)], rel=1e-5
    )
    assert history["mae"] == pytest.approx([abs(errors).mean()], rel=1e-5)


def test_sums_may_weigh_by_a_number_of_the_shapes(rng):
    model, (x, y) = linear(rng), rows(rng)

    def objective(model, batch):
        return Sums((model(batch[0]) - batch[1]).square().sum(), batch[0].shape[0])

    found = evaluate(model, [(x[:5], y[:5]), (x[5:], y[5:])], objective=objective)
    assert found["loss"] == pytest.approx(squared_errors(model, x, y).mean(), rel=1e-6)


def test_the_mean_and_the_sum_of_an_objective_train_alike(rng):
    x, y = rows(rng)
    objectives = [
        lambda m, b: (m(b[0]) - b[1]).square().mean(),
        lambda m, b: ((m(b[0]) - b[1]).square().mean(), {}),
        lambda m, b: Sums((m(b[0]) - b[1]).square().sum(), len(b[0])),
    ]
    found = []
    for objective in objectives:
        model = linear(np.random.default_rng(1))
        trainer = Trainer(model, optim.SGD(0.1), objective=objective, gradient_accumulation=2)
        trainer.fit([(x[:8], y[:8]), (x[8:], y[8:])], verbose=0)
        found.append(np.array(model.weight))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_an_objective_gets_the_batch_as_the_loader_gave_it(kind, rng):
    seen = []
    parts = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in "abcde"}
    batch = parts if kind is dict else kind(parts.values())

    def objective(model, batch):
        seen.append((type(batch), len(batch)))
        values = list(batch.values()) if isinstance(batch, dict) else batch
        return sum(model(value).square().mean() for value in values)

    Trainer(linear(rng), optim.SGD(0.1), objective=objective).fit([batch], verbose=0)
    assert seen == [(kind, 5)]


def test_an_array_of_one_value_is_a_scalar(rng):
    model, (x, _) = linear(rng), rows(rng)
    trainer = Trainer(
        model, optim.SGD(0.1), objective=lambda m, b: m(b).square().mean(keepdims=True)
    )
    history = trainer.fit([x], verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize(
    "result", [None, 3.0, np.float32(1), "vector", {"loss": 1}], ids=lambda r: type(r).__name__
)
def test_what_is_not_a_scalar_is_refused(result, rng):
    def objective(model, batch):
        return model(batch) if result == "vector" else result

    with pytest.raises(ConfigurationError, match="expected a scalar"):
        Trainer(linear(rng), optim.SGD(0.1), objective=objective).fit([rows(rng)[0]], verbose=0)


# --- one output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
def test_weights_of_rows_may_have_an_axis_of_one(shape, rng):
    model, (x, y) = linear(rng), rows(rng)
    weights = rng.random(shape).astype(np.float32)
    found = evaluate(model, [(x, y, weights)], "mse", ["mae"])
    expected = np.average(squared_errors(model, x, y), weights=weights.reshape(-1))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_weights_of_positions_average_the_axes_beyond_them(rng):
    """Losses (batch, time, features), weights (batch, time)."""
    x, y = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)[:, :, :, :], None
    y = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
    weights = rng.random((2, 5)).astype(np.float32)
    model = linear(rng, 2)
    found = evaluate(model, [(x, y, weights)], "mse")
    losses = ((x @ np.array(model.weight).T - y) ** 2).mean((2, 3))
    assert found["loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, bool])
def test_weights_may_have_any_dtype(dtype, rng):
    model, (x, y) = linear(rng), rows(rng)
    weights = (np.arange(12) % 3).astype(dtype)
    found = evaluate(model, [(x, y, weights)], "mse")
    expected = np.average(squared_errors(model, x, y), weights=weights.astype(float))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("ignored", [False, True])
def test_weights_of_another_length_are_refused(ignored, on_device, rng):
    x, y = rng.normal(size=(4, 4)).astype(np.float32), rng.integers(0, 3, 4)
    y[0] = -100 if ignored else 0
    batch = (x, y, np.ones(5, np.float32))
    if on_device:
        batch = tuple(map(mx.array, batch))
    with pytest.raises(DataError, match=r"weights.*\(5,\)"):
        Trainer(nn.Linear(4, 3), optim.SGD(0.1), "cross_entropy").fit([batch], verbose=0)


def test_a_scalar_loss_with_weights_is_refused(rng):
    x, y = rows(rng)

    def loss(outputs, targets):
        return (outputs - targets).square().mean()

    with pytest.raises(ConfigurationError, match="per-example"):
        evaluate(linear(rng), [(x, y, np.ones(12, np.float32))], loss)
    with pytest.raises(ConfigurationError, match="per-example"):
        Trainer(linear(rng), optim.SGD(0.1), loss).fit(
            [(x, (y > 0).astype(np.int32))], class_weight={0: 2.0}, verbose=0
        )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_scalar_mean_as_the_loss_weighs_its_rows(accumulation, rng):
    x, y = rows(rng)

    def loss(outputs, targets):
        return (outputs - targets).square().mean()

    found = []
    for batches in ([(x, y)], [(x[:9], y[:9]), (x[9:], y[9:])]):
        model = linear(np.random.default_rng(1))
        rate = 0.1 if accumulation == 2 else 0.0  # without a window only the mean can agree
        trainer = Trainer(model, optim.SGD(rate), loss, gradient_accumulation=accumulation)
        history = trainer.fit(batches, verbose=0)
        found.append([*np.array(model.weight).ravel(), *history.history["loss"]])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_labels_out_of_range_are_named_where_they_come_from_the_host(rng):
    x, y = rng.normal(size=(4, 4)).astype(np.float32), np.array([0, 1, 2, 3])
    trainer = Trainer(nn.Linear(4, 3), optim.SGD(0.1), "cross_entropy")
    for batches in ([(x, y)], [(x, y % 3), (x, y)]):  # while tracing, and at a known shape
        with pytest.raises(DataError, match=r"targets\[3\] is 3") as caught:
            trainer.fit(batches, verbose=0)
        assert caught.value.index == 3
    with pytest.raises(DataError, match="is -1"):
        trainer.fit([(x, y - 1)], verbose=0)
    trainer.fit([(x, y % 3)], verbose=0)


def test_a_model_that_got_more_outputs_takes_more_labels(rng):
    x, y = rng.normal(size=(4, 4)).astype(np.float32), np.array([0, 1, 2, 2])
    model = nn.Sequential(nn.Linear(4, 3))
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy")
    trainer.fit([(x, y)], [(x, y)], verbose=0)
    model.layers[0] = nn.Linear(4, 10)
    history = trainer.fit([(x, y + 7)], [(x, y + 7)], verbose=0)
    assert np.isfinite([history.history["loss"], history.history["val_loss"]]).all()


def test_a_loss_of_the_wrong_length_is_refused(rng):
    x, y = rows(rng)
    with pytest.raises(DataError, match=r"\(2,\).*12 rows"):
        evaluate(linear(rng), [(x, y)], lambda outputs, targets: mx.zeros(2))


def test_a_batch_without_targets_is_refused(rng):
    with pytest.raises(DataError, match="no targets"):
        evaluate(linear(rng), [rows(rng)[0]], "mse")


def test_several_outputs_without_names_are_refused(rng):
    class Two(nn.Module):
        def __call__(self, x):
            return x, x

    with pytest.raises(ConfigurationError, match="several arrays"):
        evaluate(Two(), [rows(rng)], "mse")


def test_metrics_of_the_same_name_are_refused(rng):
    with pytest.raises(ConfigurationError, match="mae"):
        evaluate(linear(rng), [rows(rng)], "mse", ["mae", "mae"])


# --- several inputs and outputs -------------------------------------------------------------------


class Heads(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 3)

    def __call__(self, a, b):
        return {"value": self.left(a), "kind": self.right(a + b)}


def heads_batch(rng, n=10):
    x = {name: rng.normal(size=(n, 4)).astype(np.float32) for name in "ab"}
    y = {
        "value": rng.normal(size=(n, 1)).astype(np.float32),
        "kind": rng.integers(0, 3, n),
    }
    return x, y


def heads_losses(model, x, y):
    value = x["a"] @ np.array(model.left.weight).T + np.array(model.left.bias)
    logits = (x["a"] + x["b"]) @ np.array(model.right.weight).T + np.array(model.right.bias)
    chances = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), y["kind"]]
    return ((value - y["value"]) ** 2)[:, 0], chances, logits


def take(tree, part):
    if isinstance(tree, dict):
        return {key: take(value, part) for key, value in tree.items()}
    return tree[part]


@pytest.mark.parametrize("weighted", [False, True])
def test_named_outputs_have_losses_and_metrics_of_their_own(weighted, rng):
    model, (x, y) = Heads(), heads_batch(rng)
    objective = Supervised(
        {"value": "mse", "kind": "cross_entropy"},
        loss_weights={"value": 0.5},
        metrics={"kind": ["accuracy"], "value": "mae"},
    )
    weights = rng.random(10).astype(np.float32) if weighted else np.ones(10, np.float32)
    parts = [slice(0, 6), slice(6, 10)]
    batches = [
        (take(x, p), take(y, p), weights[p]) if weighted else (take(x, p), take(y, p))
        for p in parts
    ]
    found = evaluate(model, batches, objective=objective)
    value, kind, logits = heads_losses(model, x, y)
    right = logits.argmax(-1) == y["kind"]
    expected = {
        "loss": np.average(0.5 * value + kind, weights=weights),
        "value_loss": np.average(value, weights=weights),
        "kind_loss": np.average(kind, weights=weights),
        "kind_accuracy": np.average(right, weights=weights),
        "value_mae": np.average(np.sqrt(value), weights=weights),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_list_of_metrics_is_computed_for_each_output(rng):
    model, (x, y) = Heads(), heads_batch(rng)
    y["kind"] = np.eye(3, dtype=np.float32)[y["kind"]]
    history = Trainer(model, optim.SGD(0.1), {"value": "mse", "kind": "mse"}, ["mae"]).fit(
        [(x, y)], [(x, y)], verbose=0
    )
    keys = {"loss", "value_loss", "kind_loss", "value_mae", "kind_mae"}
    assert keys | {f"val_{key}" for key in keys} <= set(history.history)


def test_weights_may_differ_by_output(rng):
    model, (x, y) = Heads(), heads_batch(rng)
    weights = {"value": rng.random(10), "kind": rng.random(10)}
    found = evaluate(model, [(x, y, weights)], {"value": "mse", "kind": "cross_entropy"})
    value, kind, _ = heads_losses(model, x, y)
    ours = np.average(value, weights=weights["value"]), np.average(kind, weights=weights["kind"])
    assert found["value_loss"] == pytest.approx(ours[0], rel=1e-5)
    assert found["kind_loss"] == pytest.approx(ours[1], rel=1e-5)
    assert found["loss"] == pytest.approx(sum(ours), rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_named_outputs_in_micro_batches_equal_the_big_batch(weighted, rng):
    x, y = heads_batch(rng)
    weights = rng.random(10).astype(np.float32)
    found = []
    for parts in ([slice(0, 10)], [slice(0, 3), slice(3, 4), slice(4, 10)]):
        mx.random.seed(1)
        trainer = Trainer(
            Heads(),
            optim.SGD(0.1),
            {"value": "mse", "kind": "cross_entropy"},
            gradient_accumulation=len(parts),
        )
        batches = [(take(x, p), take(y, p), weights[p])[: 3 if weighted else 2] for p in parts]
        history = trainer.fit(batches, verbose=0)
        found.append((np.array(trainer.model.right.weight), history.history["loss"]))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5, atol=1e-7)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)


def test_ignored_targets_of_one_output_count_only_there(rng):
    model, (x, y) = Heads(), heads_batch(rng)
    y["kind"][:4] = -1
    losses = {"value": "mse", "kind": CrossEntropy(ignore_index=-1)}
    found = evaluate(model, [(x, y)], losses)
    value, kind, _ = heads_losses(model, x, {**y, "kind": np.maximum(y["kind"], 0)})
    assert found["value_loss"] == pytest.approx(value.mean(), rel=1e-5)
    assert found["kind_loss"] == pytest.approx(kind[4:].mean(), rel=1e-5)


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_inputs_in_a_tuple_reach_the_model_as_one_argument(kind, rng):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 1)

        def __call__(self, inputs):
            a, b = inputs
            return self.last(a + b)

    model, (x, y) = Sum(), rows(rng)
    found = evaluate(model, [(kind([x, 2 * x]), y)], "mse")
    outputs = 3 * x @ np.array(model.last.weight).T + np.array(model.last.bias)
    assert found["loss"] == pytest.approx(((outputs - y) ** 2).mean(), rel=1e-5)


def test_predict_gives_a_tree_like_the_outputs(rng):
    class Outputs(nn.Module):
        def __call__(self, x):
            return {"a": x, "pair": (x + 1, [x + 2])}

    x = rng.normal(size=(10, 4)).astype(np.float32)
    found = Trainer(Outputs(), batch_size=4).predict(x, verbose=0)
    assert isinstance(found["pair"], tuple)
    assert isinstance(found["pair"][1], list)
    np.testing.assert_array_equal(found["pair"][1][0], x + 2)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ({}, {}, "names no output"),
        ({"a": "mse"}, {"loss_weights": {"b": 1.0}}, r"\['b'\]"),
        ("mse", {"loss_weights": {"b": 1.0}}, "one unnamed output"),
        ({"a": "mse"}, {"metrics": {"b": "mae"}}, r"\['b'\]"),
        ("mse", {"metrics": {"a": "mae"}}, "as a dict too"),
    ],
    ids=str,
)
def test_names_that_do_not_fit_are_refused_at_construction(loss, options, message):
    with pytest.raises(ConfigurationError, match=message):
        Supervised(loss, **options)


@pytest.mark.parametrize("missing", ["outputs", "targets"])
def test_an_output_that_is_not_there_is_named(missing, rng):
    model, (x, y) = Heads(), heads_batch(rng)
    loss = {"value": "mse", "typo": "mse"} if missing == "outputs" else {"value": "mse"}
    y = y if missing == "outputs" else {"other": y["value"]}
    with pytest.raises(ConfigurationError, match=rf"the {missing} have"):
        evaluate(model, [(x, y)], loss)


def test_loss_and_objective_exclude_each_other():
    objective = as_objective(None, (), lambda model, batch: mx.array(0.0))
    assert as_objective(None, (), objective) is objective
    for arguments in (("mse", (), objective), (None, ["mae"], objective), (None, ["mae"], None)):
        with pytest.raises(ConfigurationError):
            as_objective(*arguments)
    with pytest.raises(ConfigurationError, match="not callable"):
        as_objective(None, (), "mse")
    assert as_objective(None, (), None) is None


def test_directions_come_from_losses_and_metrics():
    objective = Supervised({"a": "mse", "b": "mse"}, metrics={"a": ["mae", "r2"]})
    assert objective.directions == {
        "loss": False,
        "a_loss": False,
        "b_loss": False,
        "a_mae": False,
        "a_r2": True,
    }


# --- means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 10, 49, 1000])
def test_a_mask_of_ones_gives_the_bits_of_the_plain_mean(size, rng):
    losses = mx.array(rng.random((50, size)), mx.float32)
    for row in losses:
        plain = mean_loss(row, None, None, (size,))[0]
        assert mean_loss(row, None, mx.ones(size), (size,))[0].item() == plain.item()
        assert mean_loss(row, mx.ones(size), None, (size,))[0].item() == plain.item()
        assert plain.item() == row.mean().item()


def test_the_weighted_mean_of_many_losses_is_right(rng):
    """A plain CPU sum of 4 million is off in the third digit."""
    losses = mx.full((4_000_000,), 0.1)
    mean, weight = mean_loss(losses, mx.full((4_000_000,), 0.3), None, (4_000_000,))
    assert mean.item() == pytest.approx(0.1, rel=1e-5)
    assert weight.item() == pytest.approx(1.2e6, rel=1e-5)


@pytest.mark.parametrize("row_weights", [False, True])
@pytest.mark.parametrize("batch_size", [3, 4, 8])
def test_tokens_weigh_the_same_whether_or_not_their_batch_ignores_some(batch_size, row_weights):
    """Half of the rows ignore some tokens; cut anyhow, it is PyTorch's mean over tokens."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 7, 4)).astype(np.float32), rng.integers(0, 5, (8, 7))
    y[:4, 5:] = -100
    weights = rng.uniform(0.5, 2, 8).astype(np.float32) if row_weights else np.ones(8, np.float32)
    data = (x, y, weights) if row_weights else (x, y)
    model = nn.Linear(4, 5)
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy", ["accuracy"], batch_size=batch_size)
    logits = torch.tensor(np.array(model(mx.array(x))))
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(y).flatten(), reduction="none"
    ).numpy()
    tokens = np.repeat(weights, 7) * (y.reshape(-1) != -100)
    found = trainer.evaluate(data, verbose=0)
    assert found["loss"] == pytest.approx((each * tokens).sum() / tokens.sum(), rel=1e-5)
    right = logits.numpy().argmax(-1).reshape(-1) == y.reshape(-1)
    assert found["accuracy"] == pytest.approx((right * tokens).sum() / tokens.sum(), rel=1e-5)


def test_accumulated_token_batches_equal_the_big_one_where_some_ignore_labels():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 7, 4)).astype(np.float32), rng.integers(0, 5, (8, 7))
    y[:4, 5:] = -100
    found = []
    for batch_size, accumulation in ((8, 1), (4, 2), (3, 3)):
        mx.random.seed(0)
        trainer = Trainer(
            nn.Linear(4, 5),
            optim.SGD(0.5),
            "cross_entropy",
            batch_size=batch_size,
            gradient_accumulation=accumulation,
        )
        trainer.fit((x, y), epochs=3, shuffle=False, verbose=0)
        found.append(np.array(trainer.model.weight))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


def test_the_total_of_several_outputs_is_the_sum_of_its_parts_however_batches_are_cut():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 7, 4)).astype(np.float32), rng.integers(0, 5, (8, 7))
    y[:4, 5:] = -100

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 1)

        def __call__(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    objective = Supervised({"a": "cross_entropy", "b": "mse"}, loss_weights={"b": 0.5})
    model, data = Both(), (x, {"a": y, "b": x.sum(-1)})
    found = [
        Trainer(model, None, objective=objective, batch_size=size).evaluate(data, verbose=0)
        for size in (8, 4, 3)
    ]
    for values in found:
        assert values["loss"] == pytest.approx(values["a_loss"] + 0.5 * values["b_loss"])
        assert values == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("weights", [(1, 11), (11, 1), (1, 23), (12, 3), (2, 10), (21, 0)], ids=str)
def test_factors_of_losses_are_not_mistaken_for_others_with_the_same_digits(weights):
    """MLX names kernels by the digits of their constants and keeps them between programs."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def __call__(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    x = np.ones((4, 3), np.float32)
    y = {"a": np.ones((4, 1), np.float32), "b": np.full((4, 1), 3.0, np.float32)}
    found = []
    for compiles in (True, False):
        mx.random.seed(0)
        factors = dict(zip("ab", weights, strict=True))
        objective = Supervised({"a": "mse", "b": "mse"}, loss_weights=factors)
        trainer = Trainer(Both(), optim.SGD(0.01), objective=objective, compile=compiles)
        found.append(trainer.train_on_batch(x, y) | {"w": np.array(trainer.model.b.weight)[0, 0]})
    assert found[0] == found[1]


def test_one_named_output_weighs_like_an_unnamed_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 7, 4)).astype(np.float32), rng.integers(0, 5, (8, 7))
    y[:4, 5:] = -100
    model = nn.Linear(4, 5)
    plain = Trainer(model, None, "cross_entropy", batch_size=3).evaluate((x, y), verbose=0)

    class Named(nn.Module):
        def __call__(self, x):
            return {"a": model(x)}

    named = Trainer(Named(), None, {"a": "cross_entropy"}, batch_size=3)
    assert named.evaluate((x, {"a": y}), verbose=0) == pytest.approx(plain)


def test_class_weights_are_refused_where_an_objective_would_not_see_them():
    trainer = Trainer(nn.Linear(4, 3), optim.SGD(0.1), objective=lambda m, b: m(b[0]).mean())
    with pytest.raises(ConfigurationError, match="class_weight needs a loss"):
        trainer.fit((np.ones((4, 4)), np.zeros(4, int)), class_weight={0: 2.0}, verbose=0)
