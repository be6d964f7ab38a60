"""PEFT's layout, both ways, against the real package on a Llama of transformers."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from llama import TOKENS, logits, make_llama, save_llama, shake

from mlx_fit import CheckpointCorruptError, CheckpointMismatchError, ConfigurationError
from mlx_fit.finetune import apply_lora, load_adapters, save_adapters

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "lora": ({}, {}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "head and embedding": (
        {"targets": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ),
    "patterns and rsLoRA": (
        {
            "rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
        {
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "all biases": ({"bias": "all"}, {"bias": "all"}),
    "adapted biases": (
        {"bias": "lora_only", "targets": ["q_proj"]},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
    ),
}
BIASED = {"attention_bias": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(make_llama(**BIASED), tmp_path_factory.mktemp("base"))


def torch_base(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def make_theirs(folder, path, **options):
    """A model of PEFT with shaken adapters, saved to a path."""
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return torch_logits(model)


def make_ours(path, **options):
    model = make_llama(**BIASED)
    apply_lora(model, rank=4, alpha=8, **options)
    shake(model)
    save_adapters(model, path, format="peft")
    return logits(model)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_our_files(folder, tmp_path, case):
    expected = make_ours(tmp_path, **CASES[case][0])
    theirs = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path)
    np.testing.assert_allclose(torch_logits(theirs), expected, atol=1e-5)
    ours = make_llama(**BIASED)
    load_adapters(ours, tmp_path)
    np.testing.assert_allclose(logits(ours), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_we_compute_the_same_from_pefts_files(folder, tmp_path, case):
    expected = make_theirs(folder, tmp_path, **CASES[case][1])
    ours = make_llama(**BIASED)
    load_adapters(ours, tmp_path)
    np.testing.assert_allclose(logits(ours), expected, atol=1e-5)


def test_modules_saved_whole_go_both_ways(folder, tmp_path):
    expected = make_theirs(
        folder, tmp_path / "theirs", target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]
    )
    model = make_llama(**BIASED)
    load_adapters(model, tmp_path / "theirs")
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    save_adapters(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again), expected, atol=1e-5)


def test_a_convolution_goes_both_ways(tmp_path, rng):
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, (3, 2), padding=1)

        def forward(self, x):
            return self.conv(x)

    class Ours(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, (3, 2), padding=1)
            self.conv.weight = mx.array(conv.weight.detach().numpy().transpose(0, 2, 3, 1))
            self.conv.bias = mx.array(conv.bias.detach().numpy())

        def __call__(self, x):
            return self.conv(x)

    for dora in (False, True):
        plain = Theirs()
        theirs = peft.get_peft_model(
            plain, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["conv"], use_dora=dora)
        )
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / "theirs")
        ours = Ours(plain.conv.base_layer)
        load_adapters(ours, tmp_path / "theirs")
        x = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
        with torch.no_grad():
            expected = theirs.eval()(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
        found = np.array(ours(mx.array(x))).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        save_adapters(ours, tmp_path / "ours", format="peft")
        fresh = Theirs()
        fresh.load_state_dict(plain_state(plain))
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
        with torch.no_grad():
            found = again(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def plain_state(model):
    conv = model.conv.base_layer
    return {"conv.weight": conv.weight, "conv.bias": conv.bias}


def test_what_peft_cannot_hold_is_refused(tmp_path):
    model = make_llama()
    apply_lora(model, targets="embed_tokens", dora=True)
    with pytest.raises(ConfigurationError, match="one magnitude for each dimension"):
        save_adapters(model, tmp_path, format="peft")
    with pytest.raises(ConfigurationError, match="has no adapters, and PEFT's layout"):
        save_adapters(make_llama(), tmp_path, format="peft")


def test_other_kinds_of_adapters_are_refused(tmp_path):
    make_ours(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, error in (
        ({"peft_type": "IA3"}, ConfigurationError),
        ({"use_qalora": True}, ConfigurationError),
        ({"alora_invocation_tokens": [5]}, ConfigurationError),
        ({"init_lora_weights": "pissa_niter_4"}, ConfigurationError),
        ({"init_lora_weights": "olora"}, ConfigurationError),
        ({"r": "four"}, CheckpointCorruptError),
        ({"lora_alpha": None}, CheckpointCorruptError),
        ({"r": 8}, CheckpointMismatchError),
        ({"rank_pattern": {"(": 3}}, CheckpointCorruptError),
        ({"rank_pattern": [1]}, CheckpointCorruptError),
        ({"modules_to_save": 3}, CheckpointCorruptError),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(error):
            load_adapters(make_llama(**BIASED), tmp_path)


def test_a_pickle_is_not_loaded(tmp_path):
    make_ours(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match="is a pickle"):
        load_adapters(make_llama(**BIASED), tmp_path)
