"""Adapter layers of every kind, against the formulas in NumPy and mlx-lm's own layers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from llama import shake
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlx_fit import ConfigurationError
from mlx_fit.finetune import apply_lora, merge
from mlx_fit.finetune.adapter_layers import dense_weight


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def adapted(layer, **options):
    model = Holder(layer)
    apply_lora(model, **{"rank": 3, "alpha": 6, "targets": "layer"} | options)
    return shake(model)


QUANTIZATIONS = [
    *[{"group_size": 32, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)],
    *[{"mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")],
]

EXPERTS = [
    {"group_size": 32, "bits": 4},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
]


def linear(quantization=None, bias=True):
    layer = nn.Linear(64, 32, bias=bias)
    if bias:
        layer.bias = mx.random.normal((32,))
    return layer.to_quantized(**quantization) if quantization else layer


def full_weight(layer):
    """The adapted weight in float64, from the papers' formulas."""
    weight = np.array(dense_weight(layer.base).astype(mx.float32), np.float64)
    a, b = np.array(layer.lora_a, np.float64), np.array(layer.lora_b, np.float64)
    weight = weight + layer.settings.scale * (a @ b).T
    if layer.settings.dora:
        norms = np.linalg.norm(weight, axis=1)
        weight = weight * (np.array(layer.m, np.float64) / norms)[:, None]
    return weight


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS], ids=str)
def test_a_linear_layer_computes_the_formula(rng, dora, quantization):
    model = adapted(linear(quantization), dora=dora)
    layer = model.layer
    x = rng.normal(size=(5, 64)).astype(np.float32)
    expected = x @ full_weight(layer).T + np.array(layer.linear.bias)
    np.testing.assert_allclose(np.array(model(mx.array(x))), expected, atol=2e-5)
    merge(model)
    assert type(model.layer) is nn.Linear
    np.testing.assert_allclose(np.array(model(mx.array(x))), expected, atol=2e-5)


@pytest.mark.parametrize(("dora", "reference"), [(False, LoRALinear), (True, DoRALinear)])
def test_outputs_and_gradients_are_mlx_lms(rng, dora, reference):
    base = linear()
    theirs = reference.from_base(base, r=3, scale=2.0)
    ours = adapted(base, dora=dora).layer
    theirs.update({"lora_a": ours.lora_a, "lora_b": ours.lora_b} | ({"m": ours.m} if dora else {}))
    theirs.linear.freeze()
    x = mx.array(rng.normal(size=(5, 64)), mx.float32)
    loss = lambda layer: layer(x).square().sum()  # noqa: E731
    found = [nn.value_and_grad(layer, loss)(layer) for layer in (ours, theirs)]
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    for leaf in ("lora_a", "lora_b", *(("m",) if dora else ())):
        np.testing.assert_allclose(found[0][1][leaf], found[1][1][leaf], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_an_embedding_looks_up_and_projects_with_the_adapted_table(rng, dora, quantized):
    table = nn.Embedding(10, 64)
    model = adapted(table.to_quantized(32, 8) if quantized else table, dora=dora)
    tokens, hidden = mx.array([[1, 9, 1]]), mx.array(rng.normal(size=(2, 64)), mx.float32)
    before = np.array(model(tokens)), np.array(model.layer.as_linear(hidden))
    merge(model)
    weight = np.array(model.layer.weight)
    np.testing.assert_allclose(before[0], weight[[[1, 9, 1]]], atol=1e-5)
    np.testing.assert_allclose(before[1], np.array(hidden) @ weight.T, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantization", [None, *EXPERTS])
def test_experts_each_have_an_adapter(rng, dora, quantization):
    base = SwitchLinear(64, 16, 4)
    base.bias = mx.random.normal((4, 16))
    model = adapted(base.to_quantized(**quantization) if quantization else base, dora=dora)
    x = mx.array(rng.normal(size=(3, 1, 1, 64)), mx.float32)
    indices = mx.array([[0, 3], [1, 1], [2, 0]])
    before = np.array(model(x, indices))
    merge(model)
    assert type(model.layer) is SwitchLinear
    weight, bias = np.array(model.layer.weight), np.array(base.bias)
    for row, pair in enumerate(indices.tolist()):
        for column, expert in enumerate(pair):
            expected = weight[expert] @ np.array(x)[row, 0, 0] + bias[expert]
            np.testing.assert_allclose(before[row, column, 0], expected, atol=2e-5)


def test_experts_agree_with_mlx_lm(rng):
    base = SwitchLinear(64, 16, 4)
    ours = adapted(base).layer
    theirs = LoRASwitchLinear.from_base(base, r=3, scale=2.0)
    theirs.update({"lora_a": ours.lora_a, "lora_b": ours.lora_b})
    x = mx.array(rng.normal(size=(3, 1, 1, 64)), mx.float32)
    indices = mx.array([[0, 3], [1, 1], [2, 0]])
    assert (np.array(ours(x, indices)) == np.array(theirs(x, indices))).all()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 9, 6)),
        (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, dilation=2, bias=False), (2, 9, 7, 6)),
    ],
)
def test_a_convolution_merges_to_the_same(rng, dora, layer, shape):
    model = adapted(layer(), dora=dora)
    x = mx.array(rng.normal(size=shape), mx.float32)
    before = np.array(model(x))
    merge(model)
    np.testing.assert_allclose(before, np.array(model(x)), atol=2e-5)


def test_a_convolution_of_groups_is_refused():
    with pytest.raises(ConfigurationError, match="2 groups"):
        adapted(nn.Conv1d(4, 4, 3, groups=2))


def test_half_precision_stays_half_precision(rng):
    for dora in (False, True):
        base = linear()
        base.set_dtype(mx.bfloat16)
        model = adapted(base, dora=dora)
        assert model.layer.lora_a.dtype == mx.float32
        assert model(mx.zeros((2, 64), mx.bfloat16)).dtype == mx.bfloat16
        merge(model)
        assert model.layer.weight.dtype == mx.bfloat16


def test_dropout_works_in_training_alone(rng):
    model = adapted(linear(), dropout=0.5)
    x = mx.array(rng.normal(size=(5, 64)), mx.float32)
    model.eval()
    assert (np.array(model(x)) == np.array(model(x))).all()
    model.train()
    assert (np.array(model(x)) != np.array(model(x))).any()
