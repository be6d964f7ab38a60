"""Recomputed blocks and noisy embeddings."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import TOKENS, TextBatch, logits, make_llama, shake, text_batches
from mlx.utils import tree_flatten

from mlx_fit import CausalLM, ConfigurationError, Trainer
from mlx_fit.finetune import apply_lora, checkpoint_layers, neftune


def loss_and_gradients(model, seed=3):
    batch = TextBatch(*[mx.array(part) for part in text_batches(1)[0]])
    mx.random.seed(seed)
    loss, found = nn.value_and_grad(model, lambda m: CausalLM()(m, batch).mean)(model)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(found)}


def test_recomputed_blocks_have_the_same_gradients():
    model = make_llama()
    loss, expected = loss_and_gradients(model)
    kinds = [type(module) for module in model.modules()]
    with checkpoint_layers(model):
        again, found = loss_and_gradients(model)
    assert again == loss
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-7, err_msg=name)
    assert [type(module) for module in model.modules()] == kinds


def test_recomputed_blocks_draw_the_same_dropout_twice():
    """The gradient of a loss whose masks are fixed by the seed, against a difference quotient."""
    model = make_llama()
    apply_lora(model, dropout=0.3)
    shake(model)
    layer = model.model.layers[0].self_attn.q_proj
    value = layer.lora_b
    with checkpoint_layers(model):
        slope = loss_and_gradients(model)[1]["model.layers.0.self_attn.q_proj.lora_b"]
        step, losses = 0.01 * slope / np.linalg.norm(slope), []
        for sign in (1, -1):
            layer.lora_b = value + sign * mx.array(step)
            losses.append(loss_and_gradients(model)[0])
    assert (losses[0] - losses[1]) / 2 == pytest.approx((slope * step).sum(), rel=2e-2)


def test_recomputed_blocks_need_less_memory_in_fit():
    peaks, losses = [], []
    for recomputes in (False, True):
        model = make_llama(num_hidden_layers=8, intermediate_size=256)
        trainer = Trainer(model, optim.SGD(0.1), objective=CausalLM(), seed=0)
        batches = text_batches(2, rows=8, length=64)
        trainer.fit(batches[:1], verbose=0)
        mx.reset_peak_memory()
        if recomputes:
            with checkpoint_layers(model):
                losses.append(trainer.fit(batches, verbose=0).history["loss"])
        else:
            losses.append(trainer.fit(batches, verbose=0).history["loss"])
        peaks.append(mx.get_peak_memory())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert peaks[1] < 0.7 * peaks[0], peaks


def test_blocks_that_draw_otherwise_are_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = [nn.Sequential(nn.Dropout2d(0.1)) for _ in range(2)]

    with (
        pytest.raises(ConfigurationError, match=r"not of blocks\.0\.layers\.0"),
        checkpoint_layers(Noisy()),
    ):
        pass
    with (
        pytest.raises(ConfigurationError, match="needs a stack of blocks"),
        checkpoint_layers(nn.Linear(2, 2)),
    ):
        pass


def test_noise_has_its_size_in_training_alone():
    model = make_llama()
    table = model.model.embed_tokens
    tokens = mx.array(TOKENS)
    plain = np.array(table(tokens))
    with neftune(model, alpha=5.0):
        noise = np.array(table(tokens)) - plain
        expected = logits(model)
    size = 5.0 / math.sqrt(TOKENS.shape[1] * 64)
    assert np.abs(noise).max() <= size * 1.001
    assert noise.std() == pytest.approx(size / math.sqrt(3), rel=0.05)
    assert (expected == logits(model)).all()
    assert (np.array(table(tokens)) == plain).all()


@pytest.mark.parametrize("alpha", [0, -1.0, True, "5", math.inf])
def test_noise_of_no_size_is_refused(alpha):
    with pytest.raises(ConfigurationError, match="alpha="), neftune(make_llama(), alpha):
        pass


def test_noise_needs_an_embedding():
    with pytest.raises(ConfigurationError, match="needs an embedding"), neftune(nn.Linear(2, 2)):
        pass
