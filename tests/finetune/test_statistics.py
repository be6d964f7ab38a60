"""Counts and bytes, against arithmetic and against a real optimizer's state."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from llama import make_llama
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_fit import ConfigurationError
from mlx_fit.finetune import apply_lora, lora_plus, select, statistics


def test_eight_billion_parameters_are_counted_without_being_there():
    config = llama.ModelArgs(
        model_type="llama",
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    before = mx.get_active_memory()
    model = llama.Model(config)
    model.set_dtype(mx.bfloat16)
    select(model, last_layers=4)
    found = statistics(model, optim.AdamW(1e-4))
    block = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    assert found.num_trainable == 4 * block + 128256 * 4096 == 1_397_784_576
    assert found.num_parameters == 8_030_261_248
    assert found.trainable_bytes == 2 * found.num_trainable
    # Two moments in the dtype of the weights, a step and a rate.
    assert found.optimizer_bytes_after == 4 * found.num_trainable + 12
    assert found.optimizer_bytes_before == 4 * found.num_parameters + 12
    assert mx.get_active_memory() - before < 1e6


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.AdamW(1e-3),
        lambda: optim.SGD(0.1),
        lambda: optim.Adafactor(),
        lambda: optim.Lion(optim.cosine_decay(1e-3, 10)),
        lambda: lora_plus(optim.AdamW, 1e-3),
    ],
)
def test_the_optimizers_bytes_are_those_of_its_state(make):
    model = make_llama()
    apply_lora(model)
    optimizer = make()
    found = statistics(model, optimizer)
    optimizer.init(model.trainable_parameters())
    arrays = {id(a): a for _, a in tree_flatten(optimizer.state) if isinstance(a, mx.array)}
    parts = getattr(optimizer, "optimizers", None)
    expected = sum(array.nbytes for array in arrays.values())
    if parts:
        expected = sum(a.nbytes for part in parts for _, a in tree_flatten(part.state))
    assert found.optimizer_bytes_after == expected
    assert found.optimizer_bytes_before > expected or isinstance(optimizer, optim.Adafactor)


def test_the_optimizer_is_left_as_it_was():
    model, optimizer = make_llama(), optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    before = {name: id(array) for name, array in tree_flatten(optimizer.state)}
    statistics(model, optimizer)
    assert {name: id(array) for name, array in tree_flatten(optimizer.state)} == before


def test_quantized_parameters_count_unpacked():
    whole, packed = make_llama(), make_llama()
    nn.quantize(packed, 32, 4)
    assert statistics(packed).num_parameters == statistics(whole).num_parameters
    assert statistics(packed).frozen_bytes < statistics(whole).trainable_bytes


def test_shared_arrays_and_running_statistics_count_once_and_not_at_all():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm(4))
    model.layers.append(model.layers[0])
    assert statistics(model).num_parameters == 16 + 8
    assert statistics(model).ratio == 1.0


def test_the_table_can_be_printed():
    text = str(statistics(nn.Linear(1000, 10).freeze(keys="weight")))
    assert "trainable share             0.0999%" in text


def test_something_else_is_refused():
    with pytest.raises(ConfigurationError, match=r"expected an mlx\.nn\.Module"):
        statistics({"w": mx.zeros(3)})
