"""Adapters into weights and out, off a model and on."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from llama import TOKENS, logits, make_llama, shake
from mlx.utils import tree_flatten

from mlx_fit import ConfigurationError
from mlx_fit.finetune import apply_lora, attach, detach, disabled, fuse, merge, select, unmerge


def adapted(seed=7, bits=None, **options):
    model = make_llama()
    if bits:
        nn.quantize(model, 32, bits)
    apply_lora(model, **options)
    return shake(model, seed)


def names(model):
    return {name for name, _ in tree_flatten(model.parameters())}


@pytest.mark.parametrize("bits", [None, 4])
def test_merged_weights_compute_the_same_and_can_be_taken_out_again(bits):
    model = adapted(bits=bits)
    expected, before = logits(model), names(model)
    merge(model)
    assert not any("lora" in name for name in names(model))
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    unmerge(model)
    assert names(model) == before
    assert (logits(model) == expected).all()


def test_a_merged_model_has_the_names_of_its_base():
    model = adapted()
    merge(model)
    assert names(model) == names(make_llama())
    assert not model.trainable_parameters().get("lm_head")


def test_fusing_is_for_good():
    model = adapted()
    expected = logits(model)
    fuse(model, mx.array(TOKENS))
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"fuse\(\) cannot be undone"):
        unmerge(model)


def test_fusing_into_few_bits_is_refused_and_keeps_the_adapters():
    model = adapted(bits=4)
    expected = logits(model)
    with pytest.raises(ConfigurationError, match="quantize=False, which gives dequantized"):
        fuse(model, mx.array(TOKENS), quantize=True)
    assert (logits(model) == expected).all()
    fuse(model, mx.array(TOKENS), quantize=True, tolerance=10.0)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.QuantizedLinear)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model_in_half_precision_is_fused_without_a_tolerance(dtype, bits):
    model = make_llama()
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    apply_lora(model)
    shake(model, 7)
    expected = logits(model)
    fuse(model, mx.array(TOKENS))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert 0 < np.abs(logits(model) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("size", "bits", "mode"), [(32, 4, "mxfp4"), (16, 4, "nvfp4")])
def test_an_embedding_in_the_mx_formats_is_fused_without_a_tolerance(size, bits, mode):
    model = make_llama()
    nn.quantize(model, size, bits, mode=mode)
    apply_lora(model, targets="embed_tokens")
    shake(model, 7)
    assert fuse(model, mx.array(TOKENS)) == ["model.embed_tokens"]


def test_a_half_precision_model_still_refuses_to_lose_adapters_in_few_bits():
    model = make_llama()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 32, 4)
    apply_lora(model)
    shake(model, 7)
    with pytest.raises(ConfigurationError, match="quantize=False, which gives dequantized"):
        fuse(model, mx.array(TOKENS), quantize=True)


@pytest.mark.parametrize(("bits", "quantize"), [(None, False), (8, False), (8, True)])
@pytest.mark.parametrize(("dtype", "scale"), [(mx.bfloat16, 1e-4), (mx.float16, 1e-5)])
def test_adapters_that_round_to_nothing_are_not_fused(dtype, scale, bits, quantize):
    """A bfloat16 has 8 bits: what is below a 512th of a weight leaves it as it was."""
    model = make_llama()
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    apply_lora(model)
    shake(model, 7, scale)
    expected = logits(model)
    with pytest.raises(ConfigurationError, match=r"the adapters add to the weights \d+% would be"):
        fuse(model, mx.array(TOKENS), quantize=quantize)
    assert (logits(model) == expected).all()
    fuse(model, mx.array(TOKENS), quantize=quantize, tolerance=0.2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_adapters_that_add_nothing_can_be_fused(dtype, dora):
    model = make_llama()
    model.set_dtype(dtype)
    apply_lora(model, dora=dora)
    assert len(fuse(model, mx.array(TOKENS))) == 21


def half_precision(dtype, bits, seed=7):
    model = make_llama()
    model.set_dtype(dtype)
    nn.quantize(model, 32, bits)
    apply_lora(model)
    return shake(model, seed)


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_eight_bits_keep_the_adapters_without_a_tolerance(dtype, seed):
    model = half_precision(dtype, 8, seed)
    expected = logits(model)
    with disabled(model):
        effect = np.square(logits(model) - expected).mean()
    fuse(model, mx.array(TOKENS), quantize=True)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert np.square(logits(model) - expected).mean() < 0.02 * effect


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.01, 0.03])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_few_bits_lose_adapters_of_any_size_and_are_refused(dtype, scale, bits):
    model = make_llama()
    model.set_dtype(dtype)
    nn.quantize(model, 32, bits)
    apply_lora(model)
    shake(model, scale=scale)
    expected = logits(model)
    with pytest.raises(ConfigurationError, match="would be lost in the few bits"):
        fuse(model, mx.array(TOKENS), quantize=True)
    assert (logits(model) == expected).all()


def test_a_tolerance_is_of_the_largest_difference():
    model = half_precision(mx.bfloat16, 8)
    expected = logits(model)
    merged = half_precision(mx.bfloat16, 8)
    fuse(merged, mx.array(TOKENS), tolerance=1.0)
    moved = np.abs(logits(merged) - expected).max() / max(1.0, np.abs(expected).max())
    with pytest.raises(ConfigurationError, match="above tolerance="):
        fuse(model, mx.array(TOKENS), tolerance=0.9 * moved)
    fuse(model, mx.array(TOKENS), tolerance=1.1 * moved)


@pytest.mark.parametrize("tolerance", [-1, True, "1", float("nan")])
def test_a_tolerance_is_a_number(tolerance):
    with pytest.raises(ConfigurationError, match="tolerance="):
        fuse(adapted(), mx.array(TOKENS), tolerance=tolerance)


def test_adapters_put_on_since_are_in_the_way_of_unmerging():
    model = adapted()
    expected = logits(model)
    merge(model)
    apply_lora(model, targets="q_proj")
    with pytest.raises(ConfigurationError, match="before unmerging"):
        unmerge(model)
    detach(model)
    unmerge(model)
    assert (logits(model) == expected).all()


def test_several_adapters_share_one_base():
    model = adapted(seed=1)
    base, first = logits(make_llama()), logits(model)
    one = detach(model)
    assert (logits(model) == base).all()
    apply_lora(model, rank=2, targets="q_proj")
    second = logits(shake(model, seed=2))
    other = detach(model)
    attach(model, one)
    assert (logits(model) == first).all()
    detach(model)
    attach(model, other)
    assert (logits(model) == second).all()
    assert np.abs(first - second).max() > 0.01


def test_adapters_can_be_off_for_a_while():
    model = adapted()
    expected = logits(model)
    with disabled(model):
        assert (logits(model) == logits(make_llama())).all()
    assert (logits(model) == expected).all()


@pytest.mark.parametrize("function", [select, apply_lora, merge, unmerge, detach])
def test_something_else_than_a_model_is_refused(function):
    with pytest.raises(ConfigurationError, match="model is a int"):
        function(3)


@pytest.mark.parametrize("function", [merge, unmerge, detach, lambda m: fuse(m, TOKENS)])
def test_a_model_without_adapters_is_told(function):
    with pytest.raises(ConfigurationError, match=r"no (merged )?adapters"):
        function(make_llama())


def test_adapters_of_another_model_are_refused():
    one = detach(adapted())
    with pytest.raises(ConfigurationError, match="for another model"):
        attach(nn.Sequential(nn.Linear(2, 2)), one)
    with pytest.raises(ConfigurationError, match=r"detach\(\) them"):
        attach(adapted(), one)


def test_adapters_of_another_size_are_refused():
    small, large = (nn.Sequential(nn.Linear(4, n), nn.Linear(n, 2)) for n in (6, 8))
    apply_lora(large, rank=2, targets="layers.1")
    with pytest.raises(ConfigurationError, match=r"of type Linear and shape \(2, 8\)"):
        attach(small, detach(large))


def test_adapters_on_a_second_model_leave_the_first_with_its_base():
    first, second = adapted(), make_llama(seed=5)
    expected = logits(first)
    adapters = detach(first)
    attach(first, adapters)
    attach(second, adapters)
    assert (logits(first) == expected).all()
    second.model.layers[0].mlp.up_proj.lora_b += 1.0
    assert (logits(first) == expected).all()
    assert np.abs(logits(second) - expected).max() > 0.01


def test_what_trains_beside_the_adapters_is_not_left_behind_silently():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    apply_lora(model, targets="layers.1", bias="lora_only")
    with pytest.raises(ConfigurationError, match=r"layers.1.linear.bias train as well"):
        detach(model)
    model.freeze()
    attach(model, detach(model))
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == {"layers.1.lora_a", "layers.1.lora_b"}
