"""DPO and ORPO against the papers' formulas in NumPy, in the compiled step."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import make_llama, shake
from mlx.utils import tree_flatten

from mlx_fit import DPO, ORPO, Trainer, finetune
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.preference import reference_log_probs
from mlx_fit.text import PreferenceBatches, PreferenceDataset


class Letters:
    eos_token_id = 1

    def encode(self, text):
        return [ord(letter) - 60 for letter in text]


def pairs(count=10, seed=0):
    rng = np.random.default_rng(seed)

    def word(low, high):
        return "".join(chr(97 + i) for i in rng.integers(0, 26, rng.integers(low, high)))

    found = [
        {"prompt": word(2, 6), "chosen": word(1, 8), "rejected": word(1, 8)} for _ in range(count)
    ]
    return PreferenceDataset(found, Letters())


def small():
    return make_llama(num_hidden_layers=1)


def adapted(dropout=0.0):
    model = small()
    finetune.apply_lora(model, rank=4, dropout=dropout)
    return shake(model)


def log_probs(model, dataset):
    """Sums and counts by NumPy, one answer at a time."""
    model.eval()
    sums, counts = np.zeros((len(dataset), 2)), np.zeros((len(dataset), 2))
    for row, pair in enumerate(dataset):
        for side, (tokens, mask) in enumerate((pair[:2], pair[2:])):
            logits = np.array(model(mx.array(tokens)[None]))[0].astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for at in np.flatnonzero(mask):
                sums[row, side] += logs[at - 1, tokens[at]]
                counts[row, side] += 1
    return sums, counts


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def expected_dpo(model, reference, dataset, beta, smoothing):
    policy, base = log_probs(model, dataset)[0], log_probs(reference, dataset)[0]
    rewards = beta * (policy - base)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    return {
        "loss": losses.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "rewards/margins": margin.mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("source", ["adapters_off", "precomputed", "model"])
def test_dpo_is_equation_7(source, smoothing):
    dataset, model, base = pairs(), adapted(dropout=0.3), small()
    reference = {"model": base}.get(source, source)
    batches = PreferenceBatches(
        dataset, 4, seed=0, reference=reference_log_probs(base, dataset, batch_size=3)
    )
    objective = DPO(beta=0.3, label_smoothing=smoothing, reference=reference)
    found = Trainer(model, objective=objective).evaluate(batches, verbose=0)
    expected = expected_dpo(model, small(), dataset, 0.3, smoothing)
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_a_fresh_adapter_has_the_loss_of_no_preference():
    model = small()
    finetune.apply_lora(model)
    found = Trainer(model, objective=DPO()).evaluate(PreferenceBatches(pairs(), 5, 2), verbose=0)
    assert found["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert found["rewards/margins"] == 0


def test_orpo_is_equations_6_and_7():
    dataset, model = pairs(), adapted()
    sums, counts = log_probs(model, dataset)
    means = sums / counts
    odds = np.exp(means) / (1 - np.exp(means))
    ratio = np.log(odds[:, 0] / odds[:, 1])
    found = Trainer(model, objective=ORPO(beta=0.25)).evaluate(
        PreferenceBatches(dataset, 5, 2), verbose=0
    )
    expected = {
        "loss": (-means[:, 0] - 0.25 * log_sigmoid(ratio)).mean(),
        "nll_loss": -means[:, 0].mean(),
        "log_odds_ratio": log_sigmoid(ratio).mean(),
        "log_odds_chosen": ratio.mean(),
        "rewards/margins": 0.25 * (means[:, 0] - means[:, 1]).mean(),
        "rewards/accuracies": (means[:, 0] > means[:, 1]).mean(),
        "logps/chosen": means[:, 0].mean(),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_orpo_of_a_certain_answer_is_finite():
    class Certain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = mx.array(1.0)

        def __call__(self, tokens):
            return self.scale * 100 * (mx.arange(128) == 1) + mx.zeros((*tokens.shape, 128))

    rows = [{"prompt": "ab", "chosen": "=", "rejected": "c"}]
    batch = next(iter(PreferenceBatches(PreferenceDataset(rows, Letters()), 1)))
    trainer = Trainer(Certain(), optim.SGD(0.1), objective=ORPO())
    assert np.isfinite(trainer.train_on_batch(batch)["loss"])
    assert np.isfinite(trainer.model.scale.item())


@pytest.mark.parametrize("make", [DPO, ORPO])
def test_accumulation_equals_the_large_batch(make):
    weights = []
    for size, window in ((10, 1), (3, 4)):
        model = adapted()
        trainer = Trainer(
            model, optim.SGD(0.5), objective=make(), gradient_accumulation=window, seed=0
        )
        trainer.fit(PreferenceBatches(pairs(), size, 2, seed=0), epochs=2, verbose=0)
        weights.append(dict(tree_flatten(model.trainable_parameters())))
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=2e-5)


@pytest.mark.parametrize("make", [DPO, ORPO])
def test_training_prefers_the_chosen_and_leaves_the_base_alone(make):
    model = small()
    base = {n: np.array(v) for n, v in tree_flatten(model.parameters())}
    finetune.apply_lora(model)
    batches = PreferenceBatches(pairs(), 5, 2, seed=0)
    trainer = Trainer(model, optim.Adam(0.03), objective=make(), seed=0)
    history = trainer.fit(batches, epochs=25, verbose=0).history
    assert history["rewards/margins"][-1] > history["rewards/margins"][0] + 0.05
    assert history["loss"][-1] < history["loss"][0]
    finetune.detach(model)
    assert all(np.array_equal(v, base[n]) for n, v in tree_flatten(model.parameters()))


def test_what_is_no_reference_is_refused():
    batches = PreferenceBatches(pairs(), 5, 2, seed=0)
    with pytest.raises(ConfigurationError, match="has no adapters"):
        Trainer(small(), optim.SGD(0.1), objective=DPO()).fit(batches, verbose=0)
    model = make_llama(num_hidden_layers=1, attention_bias=True)
    finetune.apply_lora(model, bias="all")
    with pytest.raises(ConfigurationError, match="trains as well as the adapters"):
        Trainer(model, optim.SGD(0.1), objective=DPO()).fit(batches, verbose=0)
    with pytest.raises(ConfigurationError, match="the batch has none"):
        Trainer(adapted(), objective=DPO(reference="precomputed")).evaluate(batches, verbose=0)
    model = small()
    with pytest.raises(ConfigurationError, match="give a copy"):
        Trainer(model, objective=DPO(reference=model)).evaluate(batches, verbose=0)


@pytest.mark.parametrize(
    "arguments",
    [{"beta": 0}, {"beta": -1}, {"label_smoothing": 0.5}, {"reference": "base"}, {"beta": "x"}],
)
def test_arguments_that_cannot_work_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        DPO(**arguments)


def test_other_batches_are_told_what_is_expected():
    with pytest.raises(DataError, match="PreferenceBatches"):
        ORPO().host_weight((np.zeros((2, 3)), np.zeros((2, 3))))
