"""A language model fine-tuned end to end: trains, saves, loads into a fresh base."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import TOKENS, logits, make_llama, save_llama, text_batches
from mlx.utils import tree_flatten
from mlx_lm.models import mixtral
from mlx_lm.tuner import utils as tuner
from mlx_lm.utils import load_model

from mlx_fit import CausalLM, Trainer, finetune
from mlx_fit.text import BucketBatches, PackedBatches


def everything(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def frozen(model):
    free = {name for name, _ in tree_flatten(model.trainable_parameters())}
    return {name: value for name, value in everything(model).items() if name not in free}


def fit(model, optimizer=None, **options):
    objective = CausalLM(**options)
    trainer = Trainer(model, optimizer or optim.AdamW(0.02), objective=objective, seed=0)
    return trainer.fit(text_batches(4), text_batches(1, seed=9), epochs=10, verbose=0)


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize(
    ("bits", "options"), [(None, {}), (None, {"dora": True}), (4, {"dropout": 0.1})]
)
def test_adapters_train_and_come_back_in_a_fresh_base(tmp_path, bits, options, chunk_size):
    def base():
        model, _ = load_model(tmp_path / "base")  # in evaluation mode, as mlx-lm does
        if bits:
            nn.quantize(model, 32, bits)
        return model

    save_llama(make_llama(), tmp_path / "base")
    model = base()
    finetune.apply_lora(model, **options)
    before = frozen(model)
    history = fit(model, chunk_size=chunk_size)
    assert history.history["loss"][-1] < history.history["loss"][0] - 0.5
    assert history.history["val_loss"][-1] < history.history["val_loss"][0]
    after = frozen(model)
    assert all((after[name] == value).all() for name, value in before.items())
    finetune.save_adapters(model, tmp_path / "adapters")
    ours, theirs = base(), base()
    finetune.load_adapters(ours, tmp_path / "adapters")
    tuner.load_adapters(theirs, str(tmp_path / "adapters"))
    assert (logits(ours) == logits(model)).all()
    np.testing.assert_allclose(logits(theirs), logits(model), atol=1e-5)
    expected = logits(model)
    finetune.fuse(model, mx.array(TOKENS))
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)


def test_dropout_of_adapters_is_on_in_fit_and_off_in_evaluation():
    losses = {}
    for dropout in (0.0, 0.99):
        model = make_llama().eval()
        finetune.apply_lora(model, rank=4, dropout=dropout)
        for layer in model.model.layers:
            layer.mlp.down_proj.lora_b = mx.ones(layer.mlp.down_proj.lora_b.shape) * 2
        trainer = Trainer(model, optim.SGD(0.0), objective=CausalLM(), seed=0)
        history = trainer.fit(text_batches(1), text_batches(1), verbose=0).history
        losses[dropout] = history["loss"][0], history["val_loss"][0]
        assert not any(module.training for module in model.modules())
    assert losses[0.0][0] == pytest.approx(losses[0.0][1], rel=1e-6)
    assert abs(losses[0.99][0] - losses[0.99][1]) > 0.02


def test_a_mixture_of_experts_is_adapted_by_expert(tmp_path):
    def base():
        mx.random.seed(0)
        arguments = mixtral.ModelArgs(
            model_type="mixtral",
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        return mixtral.Model(arguments)

    model = base()
    names = finetune.apply_lora(model, rank=2)
    assert "model.layers.0.block_sparse_moe.switch_mlp.up_proj" in names
    history = fit(model, chunk_size=16).history["loss"]
    assert history[-1] < history[0] - 0.5
    finetune.save_adapters(model, tmp_path)
    other = base()
    tuner.load_adapters(other, str(tmp_path))
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-5)
    expected = logits(model)
    finetune.merge(model)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_b_learns_faster_with_rates_of_its_own():
    model = make_llama()
    finetune.apply_lora(model, rank=2, targets="q_proj")
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_b = mx.ones(layer.lora_b.shape)
    before = {leaf: np.array(layer[leaf]) for leaf in ("lora_a", "lora_b")}
    trainer = Trainer(model, finetune.lora_plus(optim.SGD, 1e-3, 8.0), objective=CausalLM())
    batch = text_batches(1)
    arrays = type(batch[0])(*[mx.array(part) for part in batch[0]])
    slopes = nn.value_and_grad(model, lambda m: CausalLM()(m, arrays).mean)(model)[1]
    slopes = dict(tree_flatten(slopes))
    trainer.fit(batch, verbose=0)
    for leaf, rate in (("lora_a", 1e-3), ("lora_b", 8e-3)):
        slope = np.array(slopes[f"model.layers.0.self_attn.q_proj.{leaf}"])
        np.testing.assert_allclose(np.array(layer[leaf]), before[leaf] - rate * slope, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_packed_rows_train_as_their_documents_do(chunk_size, rng):
    """mlx-lm's Llama: one update from packed rows is that from one row a document."""
    documents = [rng.integers(1, 60, n).astype(np.int32) for n in (5, 9, 3, 7, 4, 11)]
    rows = [(tokens, np.ones(len(tokens), np.uint8)) for tokens in documents]

    def trained(batches):
        model = make_llama()
        trainer = Trainer(model, optim.SGD(0.5), objective=CausalLM(chunk_size=chunk_size), seed=0)
        (batch,) = batches
        trainer.fit([batch], verbose=0)
        found = {key: values[0] for key, values in trainer.history.history.items()}
        return found, dict(tree_flatten(model.parameters()))

    packed, packed_weights = trained(PackedBatches(rows, 8, 12, seed=0))
    apart, weights = trained(BucketBatches(rows, 8, max_shapes=1, shuffle=False))
    assert packed["num_tokens"] == apart["num_tokens"] == sum(len(d) - 1 for d in documents)
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    for name, weight in weights.items():
        np.testing.assert_allclose(packed_weights[name], weight, atol=2e-5, err_msg=name)
