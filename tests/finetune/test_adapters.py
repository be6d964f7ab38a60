"""Adapter files: mlx-lm reads ours, we read mlx-lm's, and damaged ones are told apart."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import logits, make_llama, save_llama, shake, text_batches
from mlx.utils import tree_flatten
from mlx_lm.tuner import utils as tuner

from mlx_fit import (
    CausalLM,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWriteError,
    ConfigurationError,
    Trainer,
)
from mlx_fit.finetune import apply_lora, load_adapters, merge, save_adapters, select

CONFIG, ARRAYS = "adapter_config.json", "adapters.safetensors"


def base(quantization=None, **config):
    model = make_llama(**config)
    if quantization:
        nn.quantize(model, **quantization)
    return model


def saved(folder, quantization=None, **options):
    """A model with shaken adapters, saved to a folder; its logits."""
    model = base(quantization)
    apply_lora(model, **{"rank": 4, "alpha": 8} | options)
    shake(model)
    save_adapters(model, folder)
    return logits(model)


CASES = {
    "lora": ({}, None),
    "dora": ({"dora": True}, None),
    "head and embedding": ({"targets": ["lm_head", "embed_tokens", "q_proj"]}, None),
    "dora embedding": ({"targets": ["embed_tokens", "q_proj"], "dora": True}, None),
    "one layer": ({"targets": "layers.1.mlp.up_proj"}, None),
    **{f"{bits} bits": ({}, {"group_size": 32, "bits": bits}) for bits in (2, 3, 4, 5, 6, 8)},
    **{mode: ({}, {"mode": mode}) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    "dora, 4 bits": ({"dora": True}, {"group_size": 32, "bits": 4}),
    "embedding, 4 bits": ({"targets": ["embed_tokens"]}, {"group_size": 32, "bits": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_computes_the_same_from_our_files(tmp_path, case):
    options, quantization = CASES[case]
    expected = saved(tmp_path, quantization, **options)
    theirs, ours = base(quantization), base(quantization)
    tuner.load_adapters(theirs, str(tmp_path))
    np.testing.assert_allclose(logits(theirs), expected, atol=1e-5)
    load_adapters(ours, tmp_path)
    assert (logits(ours) == expected).all()
    assert np.abs(expected - logits(base(quantization))).max() > 0.01


def test_mlx_lm_loads_the_folder_from_disk(tmp_path):
    from mlx_lm.utils import load_model

    expected = saved(tmp_path / "adapters")
    model, _ = load_model(save_llama(make_llama(), tmp_path / "base"))
    tuner.load_adapters(model, str(tmp_path / "adapters"))
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.up_proj"]])
def test_we_compute_the_same_from_mlx_lms_files(tmp_path, dora, keys):
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.1} | ({"keys": keys} if keys else {})
    theirs = base()
    theirs.freeze()
    tuner.linear_to_lora_layers(theirs, 2, parameters, use_dora=dora)
    shake(theirs)
    config = {"num_layers": 2, "fine_tune_type": "dora" if dora else "lora"}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_parameters": parameters}))
    arrays = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / ARRAYS), arrays)
    ours = base()
    names = load_adapters(ours, tmp_path)
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-6)
    assert len(names) == (4 if keys else 14)


def test_what_select_trains_is_a_file_for_mlx_lm_too(tmp_path):
    model = base()
    select(model, last_layers=1)
    shake(model)
    save_adapters(model, tmp_path)
    theirs, ours = base(), base()
    tuner.load_adapters(theirs, str(tmp_path))
    load_adapters(ours, tmp_path)
    assert (logits(theirs) == logits(model)).all()
    assert (logits(ours) == logits(model)).all()
    trained = [{n for n, _ in tree_flatten(m.trainable_parameters())} for m in (model, ours)]
    assert trained[0] == trained[1]


def test_loading_goes_on_training(tmp_path):
    saved(tmp_path, dropout=0.25)
    model = base()
    load_adapters(model, tmp_path)
    free = {name.rsplit(".", 1)[-1] for name, _ in tree_flatten(model.trainable_parameters())}
    assert free == {"lora_a", "lora_b"}
    assert model.model.layers[0].mlp.up_proj.settings.dropout == 0.25
    Trainer(model, optim.AdamW(0.01), objective=CausalLM()).fit(text_batches(), verbose=0)
    save_adapters(model, tmp_path)
    again = base()
    load_adapters(again, tmp_path)
    assert (logits(again) == logits(model)).all()


def test_the_same_adapters_can_be_loaded_again(tmp_path):
    expected = saved(tmp_path)
    model = base()
    apply_lora(model, rank=4, alpha=8)
    load_adapters(model, tmp_path)
    assert (logits(model) == expected).all()
    other = base()
    apply_lora(other, rank=2)
    with pytest.raises(ConfigurationError, match="has other adapters already"):
        load_adapters(other, tmp_path)


def test_a_merged_model_has_nothing_to_save_and_an_untrained_one_neither(tmp_path):
    model = base()
    apply_lora(model)
    merge(model)
    with pytest.raises(ConfigurationError, match="nothing to save"):
        save_adapters(model, tmp_path)
    assert not any(tmp_path.iterdir())


# --- what mlx-lm's layout cannot hold -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "quantization", "text"),
    [
        ({"rank_pattern": {"q_proj": 2}}, None, "one rank for all layers"),
        ({"alpha_pattern": {"q_proj": 2}}, None, "one scale for all layers"),
        ({"dora": True}, {"group_size": 32, "bits": 6}, "a base of 6 bits"),
        (
            {"dora": True, "targets": ["embed_tokens"]},
            {"group_size": 32, "bits": 4},
            "DoRA on a quantized embedding",
        ),
    ],
)
def test_what_mlx_lm_cannot_load_is_refused_with_the_reason(tmp_path, options, quantization, text):
    model = base(quantization)
    apply_lora(model, rank=4, **options)
    with pytest.raises(ConfigurationError, match=text):
        save_adapters(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_biases_and_norms_cannot_ride_along_with_adapters(tmp_path):
    model = base(attention_bias=True)
    apply_lora(model, bias="all")
    with pytest.raises(ConfigurationError, match=r"adapters alone, and .*q_proj\.bias"):
        save_adapters(model, tmp_path)


def test_convolutions_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 2, 3))
    apply_lora(model, targets="layers.0", rank=1)
    with pytest.raises(ConfigurationError, match=r"layers\.0: a convolution"):
        save_adapters(model, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["x", "gguf"], "format='gguf'"), ([3], "directory=3"), (["a.safetensors"], "names a file")],
)
def test_arguments_are_checked(arguments, text):
    model = base()
    apply_lora(model)
    with pytest.raises(ConfigurationError, match=text):
        save_adapters(model, *arguments)


# --- files that cannot be used --------------------------------------------------------------------


def change(folder, edit):
    """Edit the arrays of a saved adapter."""
    arrays = dict(mx.load(str(folder / ARRAYS)))
    mx.eval(arrays)
    edit(arrays)
    mx.save_safetensors(str(folder / ARRAYS), arrays)


FIRST = "model.layers.0.self_attn.q_proj.lora_a"


@pytest.mark.parametrize(
    ("edit", "field", "expected"),
    [
        (lambda a: a.pop(FIRST), "missing", [FIRST]),
        (lambda a: a.update({"model.bogus": mx.ones(2)}), "extra", ["model.bogus"]),
        (lambda a: a.update({"x.lora_a": mx.ones((2, 4))}), "extra", ["x.lora_a"]),
        (lambda a: a.update({FIRST: mx.ones((3, 4))}), "misshapen", {FIRST: ((3, 4), (64, 4))}),
    ],
)
def test_arrays_that_do_not_fit_are_named_and_the_model_is_left_alone(
    tmp_path, edit, field, expected
):
    saved(tmp_path)
    change(tmp_path, edit)
    model = base()
    before = [type(module) for module in model.modules()]
    with pytest.raises(CheckpointMismatchError) as caught:
        load_adapters(model, tmp_path)
    assert getattr(caught.value, field) == expected
    assert [type(module) for module in model.modules()] == before
    assert (logits(model) == logits(base())).all()


def test_a_layer_that_the_configuration_names_must_be_there(tmp_path):
    saved(tmp_path)
    gone = FIRST.removesuffix(".lora_a")
    change(tmp_path, lambda a: [a.pop(f"{gone}.{leaf}") for leaf in ("lora_a", "lora_b")])
    with pytest.raises(CheckpointMismatchError) as caught:
        load_adapters(base(), tmp_path)
    assert caught.value.missing == [f"{gone}.lora_a", f"{gone}.lora_b"]


def test_adapters_of_another_size_are_a_mismatch(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_adapters(make_llama(intermediate_size=64), tmp_path)
    assert set(caught.value.misshapen) >= {"model.layers.0.mlp.up_proj.lora_b"}
    with pytest.raises(CheckpointMismatchError, match=r"no layers to adapt|nothing called"):
        load_adapters(nn.Sequential(nn.Linear(2, 2)), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "no adapter configuration"),
        ('{"num_layers": 3}', "no adapter configuration"),
        ('{"lora_parameters": 5}', "expected 'lora', 'dora' or 'full'"),
        ('{"fine_tune_type": "ia3", "lora_parameters": {}}', "fine_tune_type is 'ia3'"),
        ('{"lora_parameters": {"rank": "8", "scale": 1}}', "'rank' is '8'"),
        ('{"lora_parameters": {"rank": 0, "scale": 1}}', "'rank' is 0"),
        ('{"lora_parameters": {"rank": 4, "scale": NaN}}', "'scale' is nan"),
        ('{"lora_parameters": {"rank": 4, "scale": 1, "dropout": 2}}', "'dropout' is 2"),
        ("\udcff", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_damaged_configuration_is_corrupt(tmp_path, text, message):
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointCorruptError, match=message):
        load_adapters(base(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_damaged_arrays_are_corrupt(tmp_path, content):
    saved(tmp_path)
    (tmp_path / ARRAYS).write_bytes(content)
    with pytest.raises(CheckpointCorruptError):
        load_adapters(base(), tmp_path)


def test_a_cut_file_is_corrupt(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / ARRAYS).read_bytes()
    (tmp_path / ARRAYS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointCorruptError):
        load_adapters(base(), tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/adapter_config\.json does not exist"):
        load_adapters(base(), tmp_path / "nowhere")
    saved(tmp_path)
    (tmp_path / ARRAYS).unlink()
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors does not exist"):
        load_adapters(base(), tmp_path)


def test_nan_is_neither_written_nor_read(tmp_path):
    saved(tmp_path)
    before = (tmp_path / ARRAYS).read_bytes()
    model = base()
    apply_lora(model)
    model.model.layers[0].mlp.up_proj.lora_b += float("nan")
    with pytest.raises(CheckpointWriteError, match=r"up_proj\.lora_b"):
        save_adapters(model, tmp_path)
    assert (tmp_path / ARRAYS).read_bytes() == before
    change(tmp_path, lambda a: a.update({FIRST: a[FIRST] * float("nan")}))
    with pytest.raises(CheckpointCorruptError, match="NaN or infinity"):
        load_adapters(base(), tmp_path)


def test_a_save_that_fails_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = base()
    apply_lora(model)
    with pytest.raises(CheckpointWriteError):
        save_adapters(model, tmp_path / "file")


def test_saving_leaves_two_files_and_replaces_the_old_ones(tmp_path):
    saved(tmp_path)
    expected = saved(tmp_path, dora=True)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, ARRAYS}
    model = base()
    load_adapters(model, tmp_path)
    assert (logits(model) == expected).all()
