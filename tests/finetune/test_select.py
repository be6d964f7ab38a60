"""Which parameters train, on Llamas and on models of other shapes."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import make_llama, text_batches
from mlx.utils import tree_flatten

from mlx_fit import CausalLM, ConfigurationError, Trainer
from mlx_fit.finetune import select


def trainable(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def everything(model):
    return dict(tree_flatten(model.parameters()))


def test_the_last_layers_and_the_head_train_and_nothing_else():
    model = make_llama()
    select(model, last_layers=2)
    expected = {
        n for n in everything(model) if n.startswith(("model.layers.1.", "model.layers.2."))
    }
    assert trainable(model) == expected | {"lm_head.weight"}


def test_the_head_can_be_left_out_or_be_all():
    model = make_llama()
    select(model, last_layers=1, head=False)
    assert all(name.startswith("model.layers.2.") for name in trainable(model))
    assert select(model, head=True) == ["lm_head.weight"]
    assert select(model) == ["lm_head.weight"]


def test_a_tied_model_has_no_head_of_its_own():
    model = make_llama(tie_word_embeddings=True)
    select(model, last_layers=1)
    assert all(name.startswith("model.layers.2.") for name in trainable(model))
    with pytest.raises(ConfigurationError, match=r"tied to the embedding model\.embed_tokens"):
        select(model, head=True)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        select(model)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 3),
        ("self_attn.q_proj", 3),
        ("layers.[01].self_attn.?_proj", 8),
        ("model.layers.1", 9),
        ("*norm*", 7),
        (r"layers\.(0|2)\..*down", 2),
        (re.compile("gate|up"), 6),
    ],
)
def test_patterns_name_whole_parts(pattern, count):
    assert len(select(make_llama(), patterns=[pattern])) == count
    assert len(select(make_llama(), patterns=pattern)) == count


def test_part_of_a_name_is_no_match():
    with pytest.raises(ConfigurationError, match="'proj' matches nothing"):
        select(make_llama(), patterns=["proj"])


def test_a_misspelt_pattern_names_the_nearest():
    model = make_llama()
    before = trainable(model)
    with pytest.raises(ConfigurationError, match="Did you mean 'q_proj'"):
        select(model, patterns=["k_proj", "q_porj"])
    assert trainable(model) == before


def test_kinds_of_modules_and_parameters():
    model = make_llama(attention_bias=True)
    assert set(select(model, biases=True)) == {n for n in everything(model) if n.endswith(".bias")}
    norms = {n for n in everything(model) if "norm" in n}
    assert set(select(model, norms=True)) == norms
    assert set(select(model, types=[nn.RMSNorm])) == norms
    assert set(select(model, types="RMSNorm")) == norms
    assert select(model, embeddings=True) == ["model.embed_tokens.weight"]
    assert set(select(model, norms=True, embeddings=True)) == norms | {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"biases": True}, "biases=True, but Model has none"),
        ({"types": ["RMSnorm"]}, "no such module. Did you mean 'RMSNorm'"),
        ({"types": [3]}, "expected classes of modules"),
        ({"last_layers": 4}, "model.layers has 3 blocks"),
        ({"last_layers": 0}, "last_layers=0"),
        ({"last_layers": True}, "last_layers=True"),
        ({"patterns": [5]}, "patterns=5"),
        ({"norms": "yes"}, "norms='yes'; expected True or False"),
        ({"head": 1}, "head=1; expected True or False"),
    ],
)
def test_what_does_not_exist_is_refused(options, text):
    with pytest.raises(ConfigurationError, match=text):
        select(make_llama(), **options)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(12, 8)
        self.norm = nn.BatchNorm(8)
        self.blocks = [nn.TransformerEncoderLayer(8, 2) for _ in range(3)]
        self.tables = [mx.zeros(3), mx.zeros(4)]
        self.positions = mx.arange(4)
        self.fc = nn.Linear(8, 5)


def test_any_model_with_a_list_of_blocks_will_do():
    model = Vision()
    select(model, last_layers=1)
    assert all(n.startswith(("blocks.2.", "fc.")) for n in trainable(model))
    assert "fc.weight" in trainable(model)


def test_statistics_and_integers_never_train():
    model = Vision()
    assert set(select(model, patterns=["*"])) == trainable(model)
    assert "norm.weight" in trainable(model)
    assert not trainable(model) & {"norm.running_mean", "norm.running_var", "positions"}
    with pytest.raises(ConfigurationError, match="positions cannot train"):
        select(model, patterns="positions")


def test_arrays_in_lists_are_frozen_too():
    model = Vision()
    select(model, head=True)
    assert trainable(model) == {"fc.weight", "fc.bias"}
    select(model, patterns=["tables"])
    assert trainable(model) == {"tables.0", "tables.1"}


def test_quantized_weights_stay_frozen():
    model = make_llama()
    nn.quantize(model, 32, 4)
    select(model, last_layers=1)
    assert trainable(model) == {
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
    }
    with pytest.raises(ConfigurationError, match="head lm_head is quantized"):
        select(model, head=True)


def test_frozen_parameters_stay_the_same_to_the_bit():
    model = make_llama()
    select(model, last_layers=1)
    before = {name: np.array(value) for name, value in everything(model).items()}
    Trainer(model, optim.AdamW(0.01), objective=CausalLM()).fit(text_batches(), verbose=0)
    changed = {n for n, v in everything(model).items() if (np.array(v) != before[n]).any()}
    assert changed == trainable(model)
