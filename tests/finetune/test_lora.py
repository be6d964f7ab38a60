"""Which layers get adapters, with which settings, and what trains then."""

from __future__ import annotations

import math

import mlx.nn as nn
import numpy as np
import pytest
from llama import logits, make_llama
from mlx.utils import tree_flatten

from mlx_fit import ConfigurationError
from mlx_fit.finetune import apply_lora


def trainable(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_every_linear_layer_in_the_blocks_is_adapted_and_the_head_never():
    model = make_llama()
    names = apply_lora(model)
    linear = [n for n, m in make_llama().named_modules() if isinstance(m, nn.Linear)]
    assert sorted(names) == sorted(n for n in linear if n != "lm_head")
    assert trainable(model) == {f"{n}.{leaf}" for n in names for leaf in ("lora_a", "lora_b")}


def test_shapes_and_scale_are_mlx_lms():
    model = make_llama()
    apply_lora(model, rank=4, alpha=10)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.lora_a.shape == (96, 4)
    assert layer.lora_b.shape == (4, 64)
    assert layer.settings.scale == 2.5


def test_a_fresh_adapter_changes_nothing():
    for options in ({}, {"dora": True}, {"targets": ["embed_tokens", "lm_head", "q_proj"]}):
        model = make_llama(tie_word_embeddings=False)
        before = logits(model)
        apply_lora(model, **options)
        np.testing.assert_allclose(logits(model), before, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 3),
        (["q_proj", "v_proj"], 6),
        (["self_attn.q_proj"], 3),
        (["layers.1.self_attn.q_proj"], 1),
        (["model.layers.*.mlp.*"], 9),
        (["lm_head"], 1),
        (("embed_tokens",), 1),
    ],
)
def test_targets_are_ends_of_names(targets, count):
    assert len(apply_lora(make_llama(), targets=targets)) == count


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"targets": ["q_porj"]}, r"Did you mean 'q_proj'.*self_attn\.q_proj, "),
        ({"targets": ["proj"]}, "no layer is called 'proj'"),
        ({"targets": ["q_proj", "norm"]}, "model.norm is a RMSNorm"),
        ({"targets": []}, "targets is empty"),
        ({"targets": [3]}, "targets holds 3"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dora": 1}, "dora=1"),
        ({"bias": "some"}, "bias='some'"),
        ({"bias": "all"}, "no layer has a bias"),
        ({"last_layers": 4}, "model.layers has 3 blocks"),
        (
            {"targets": "layers.0.self_attn.q_proj", "last_layers": 1},
            "No target lies in the last 1",
        ),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: 'q_prj' is no adapted layer. Did you"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=0"),
        ({"rank_pattern": ["q_proj"]}, "expected a dict of target -> value"),
        ({"targets": 3}, "targets=3; expected names of layers"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern=-1"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_the_model_alone(options, text):
    model = make_llama()
    modules, free = [type(m) for m in model.modules()], trainable(model)
    with pytest.raises(ConfigurationError, match=text):
        apply_lora(model, **options)
    assert [type(m) for m in model.modules()] == modules
    assert trainable(model) == free


def test_a_second_adapter_is_refused():
    model = make_llama()
    apply_lora(model, targets="q_proj")
    with pytest.raises(ConfigurationError, match="has adapters already"):
        apply_lora(model, targets="v_proj")


def test_ranks_and_alphas_by_pattern():
    model = make_llama()
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 4}}
    apply_lora(model, rank=8, alpha=16, targets=["q_proj", "v_proj"], **patterns)
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    assert (first.q_proj.settings.rank, second.q_proj.settings.rank) == (2, 8)
    assert (first.q_proj.settings.scale, second.q_proj.settings.scale) == (8, 2)
    assert first.v_proj.settings.scale == 0.5


def test_rank_stabilised_scale():
    model = make_llama()
    apply_lora(model, rank=9, alpha=6, rslora=True)
    assert model.model.layers[0].mlp.up_proj.settings.scale == 6 / math.sqrt(9)


def test_the_last_layers_alone_can_be_adapted():
    names = apply_lora(make_llama(), last_layers=1)
    assert len(names) == 7
    assert all(name.startswith("model.layers.2.") for name in names)


def test_biases_train_where_asked():
    model = make_llama(attention_bias=True)
    apply_lora(model, targets="q_proj", bias="lora_only")
    biases = {name for name in trainable(model) if name.endswith("bias")}
    assert biases == {f"model.layers.{i}.self_attn.q_proj.linear.bias" for i in range(3)}
    model = make_llama(attention_bias=True)
    apply_lora(model, targets="q_proj", bias="all")
    assert len({name for name in trainable(model) if name.endswith("bias")}) == 12


def test_a_model_without_blocks_needs_targets():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ConfigurationError, match="has none"):
        apply_lora(model)
    assert apply_lora(model, targets=["layers.0", "layers.2"]) == ["layers.0", "layers.2"]


def test_a_layer_in_two_places_gets_one_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.layers.append(model.layers[0])
    apply_lora(model, targets=["layers.0", "layers.2"])
    assert model.layers[0] is model.layers[2]


def test_the_mode_of_the_base_is_kept():
    model = make_llama().eval()
    apply_lora(model, dropout=0.5)
    assert not any(module.training for module in model.modules())
