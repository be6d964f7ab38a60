"""The load-balancing loss against transformers' function for Mixtral."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.models.mixtral as mixtral
import numpy as np
import pytest
from llama import CONFIG, make_llama, text_batches
from mlx.utils import tree_flatten

from mlx_fit import CausalLM, ConfigurationError, Trainer, finetune
from mlx_fit.finetune.routers import balance

EXPERTS = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "rope_traditional": False,
}


def make_mixtral():
    mx.random.seed(0)
    model = mixtral.Model(mixtral.ModelArgs.from_dict(CONFIG | EXPERTS))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (8, 1), (5, 3)])
def test_the_loss_of_a_router_is_transformers(rng, experts, chosen):
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = rng.normal(size=(3, 7, experts)).astype(np.float32)
    flat = (torch.tensor(logits.reshape(-1, experts)),)
    expected = load_balancing_loss_func(flat, experts, chosen).item()
    assert balance(mx.array(logits), chosen).item() == pytest.approx(expected, rel=1e-5)


def heard_by_hand(model, tokens):
    """The routers' logits, by running the blocks one after another."""
    found = []
    hidden = model.model.embed_tokens(tokens)
    for layer in model.layers:
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), "causal")
        normed = layer.post_attention_layernorm(hidden)
        found.append(layer.block_sparse_moe.gate(normed))
        hidden = hidden + layer.block_sparse_moe(normed)
    return found


def test_a_fit_adds_the_mean_of_all_routers():
    model, [batch] = make_mixtral(), text_batches(1)
    logits = heard_by_hand(model, mx.array(batch.tokens))
    expected = 0.1 * np.mean([balance(each, 2).item() for each in logits])
    with finetune.RouterLoss(model, 0.1) as aux_loss:
        trainer = Trainer(model, optim.SGD(0.0), objective=CausalLM(aux_loss=aux_loss))
        history = trainer.fit([batch], verbose=0).history
    assert history["aux_loss"][0] == pytest.approx(expected, rel=1e-4)
    with_out = Trainer(model, objective=CausalLM()).evaluate([batch], verbose=0)["loss"]
    assert history["loss"][0] == pytest.approx(with_out + expected, rel=1e-5)


def test_training_on_it_makes_the_experts_equally_busy():
    model, batches = make_mixtral(), text_batches(2)
    for layer in model.layers:  # one expert is everybody's
        layer.block_sparse_moe.gate.weight = layer.block_sparse_moe.gate.weight * 20
    names = dict(tree_flatten(model.parameters())).keys()
    with finetune.RouterLoss(model, 10.0) as aux_loss:
        trainer = Trainer(model, optim.Adam(0.01), objective=CausalLM(aux_loss=aux_loss))
        history = trainer.fit(batches, epochs=8, verbose=0).history["aux_loss"]
    assert history[-1] < history[0]
    assert dict(tree_flatten(model.parameters())).keys() == names
    assert type(model.layers[0].block_sparse_moe.gate) is nn.Linear


def test_adapted_routers_and_chunks_are_heard_too():
    model, [batch] = make_mixtral(), text_batches(1)
    finetune.apply_lora(model)
    losses = []
    for chunk_size in (None, 7):
        with finetune.RouterLoss(model) as aux_loss:
            objective = CausalLM(chunk_size=chunk_size, aux_loss=aux_loss)
            trainer = Trainer(model, optim.SGD(0.0), objective=objective)
            losses.append(trainer.fit([batch], verbose=0).history["aux_loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_cannot_be_heard_is_refused():
    with pytest.raises(ConfigurationError, match="needs a mixture of experts"):
        finetune.RouterLoss(make_llama())
    with pytest.raises(ConfigurationError, match="weight=0"):
        finetune.RouterLoss(make_mixtral(), 0)
    outside = finetune.RouterLoss(make_mixtral())
    with pytest.raises(ConfigurationError, match="has not heard"):
        outside(None, None)
