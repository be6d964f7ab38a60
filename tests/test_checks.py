"""Numbers are Python's and NumPy's, wherever an argument is one."""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import make_llama

from mlx_fit import DPO, ORPO, CausalLM, ConfigurationError, Supervised, Trainer, finetune
from mlx_fit.callbacks.timer import parse_seconds
from mlx_fit.checks import number

KINDS = [np.float16, np.float32, np.float64, np.int8, np.uint64, Fraction, float, int]


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_number_of_any_kind_is_a_float(kind):
    found = number("x", kind(3), 0.0)
    assert type(found) is float
    assert found == 3.0


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), "3", None, 1j, [3], np.array([3.0]), np.float32("nan"), 10**400, mx.inf],
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"^x=.*; expected a number\.$"):
        number("x", value)


@pytest.mark.parametrize(
    ("limits", "good", "bad", "text"),
    [
        ({"least": 0}, 0, -0.1, "a number of at least 0."),
        ({"above": 0}, 0.1, 0, "a number above 0."),
        ({"least": 0, "below": 1}, 0, 1, "a number of at least 0 and below 1."),
        ({"least": 0, "most": 1}, 1, 1.1, "a number of at least 0 and at most 1."),
        ({"below": 0.5}, 0.4, 0.5, "a number below 0.5."),
    ],
)
def test_limits_are_kept_and_named(limits, good, bad, text):
    assert number("x", good, **limits) == good
    with pytest.raises(ConfigurationError) as caught:
        number("x", bad, **limits)
    assert str(caught.value) == f"x={bad!r}; expected {text}"


def lora(**options):
    return finetune.apply_lora(make_llama(num_hidden_layers=1), **options)


def noisy(alpha):
    with finetune.neftune(make_llama(num_hidden_layers=1), alpha):
        pass


TAKERS = {
    "CausalLM label_smoothing": lambda x: CausalLM(label_smoothing=x),
    "CausalLM z_loss": lambda x: CausalLM(z_loss=x),
    "DPO beta": lambda x: DPO(beta=x),
    "DPO label_smoothing": lambda x: DPO(label_smoothing=x),
    "ORPO beta": lambda x: ORPO(beta=x),
    "InfoNCE": lambda x: finetune.InfoNCE(temperature=x),
    "LoRA alpha": lambda x: lora(alpha=x),
    "LoRA alpha_pattern": lambda x: lora(alpha_pattern={"q_proj": x}),
    "LoRA dropout": lambda x: lora(dropout=x),
    "LoRA+ rate": lambda x: finetune.lora_plus(optim.SGD, x),
    "LoRA+ ratio": lambda x: finetune.lora_plus(optim.SGD, 0.1, ratio=x),
    "NEFTune": noisy,
    "loss_weights": lambda x: Supervised({"a": "mse"}, loss_weights={"a": x}),
    "clip_norm": lambda x: Trainer(make_llama(), optim.SGD(0.1), "mse", clip_norm=x),
    "a budget of time": lambda x: parse_seconds(x, "budget"),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_each_numeric_argument_takes_numpys_numbers_and_no_booleans(take):
    for kind in (float, np.float16, np.float32, np.float64):
        take(kind(0.25))
    for wrong in (True, np.bool_(True), "0.25", np.array([0.25])):
        with pytest.raises(ConfigurationError):
            take(wrong)


def test_numpys_numbers_are_written_to_an_adapters_file(tmp_path):
    model = make_llama(num_hidden_layers=1)
    options = {"alpha": np.float32(8), "dropout": np.float32(0.5), "rank": np.int64(4)}
    finetune.apply_lora(model, **options)
    finetune.save_adapters(model, tmp_path)
    finetune.save_adapters(model, tmp_path / "peft", "peft")
    fresh = make_llama(num_hidden_layers=1)
    finetune.load_adapters(fresh, tmp_path)
    assert fresh.model.layers[0].mlp.up_proj.settings.scale == 2.0
