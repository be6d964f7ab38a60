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
from mlx_fit.text.preference import PreferenceBatch


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


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_fresh_adapter_is_exactly_its_reference_in_training_too(chunk_size):
    model = small()
    finetune.apply_lora(model, dropout=0.2)
    trainer = Trainer(model, optim.SGD(0.0), objective=DPO(chunk_size=chunk_size))
    history = trainer.fit(PreferenceBatches(pairs(), 5, 2, seed=0), verbose=0).history
    assert history["rewards/margins"] == [0.0]
    assert history["rewards/accuracies"] == [0.0]


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


# --- without the logits of all tokens -------------------------------------------------------------


def gradients(model, batch, objective):
    arrays = PreferenceBatch(*map(mx.array, batch))
    loss, found = nn.value_and_grad(model, lambda m: objective(m, arrays).mean)(model)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(found)}


def plain_orpo(model, batch):
    """Equation 6 and its gradients by MLX's own functions, from all logits."""
    tokens, targets, weights, _ = map(mx.array, batch)
    shape = tokens.shape

    def loss(model):
        logits = model(tokens.reshape(-1, shape[-1]))
        nll = nn.losses.cross_entropy(logits, targets.reshape(-1, shape[-1])).reshape(shape)
        means = -(nll * weights).sum(-1) / weights.sum(-1)
        odds = means - mx.log(1 - mx.exp(means))
        return (mx.logaddexp(0.0, odds[:, 1] - odds[:, 0]) * 0.3 - means[:, 0]).mean()

    value, found = nn.value_and_grad(model, loss)(model)
    return value.item(), {name: np.array(g) for name, g in tree_flatten(found)}


@pytest.mark.parametrize("trains", ["all", "adapters", "head"])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(trains, chunk_size, tied):
    model = make_llama(num_hidden_layers=1, tie_word_embeddings=tied)
    if trains == "adapters":
        shake(finetune.apply_lora(model) and model)
    elif trains == "head":
        shake(finetune.apply_lora(model, targets="embed_tokens" if tied else "lm_head") and model)
    batch = next(iter(PreferenceBatches(pairs(), 5, 2, seed=0)))
    loss, expected = plain_orpo(model, batch)
    for training in (True, False):
        model.train(training)
        value, found = gradients(model, batch, ORPO(0.3, chunk_size=chunk_size))
        assert value == pytest.approx(loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, slope in expected.items():
            np.testing.assert_allclose(found[name], slope, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("source", ["adapters_off", "precomputed", "model"])
def test_dpo_in_chunks_trains_as_the_whole_does(source):
    histories, weights = [], []
    for chunk_size in (None, 6):
        model, base, dataset = adapted(), small(), pairs()
        known = reference_log_probs(base, dataset, 3, chunk_size)
        batches = PreferenceBatches(dataset, 4, 4, seed=0, reference=known)
        reference = {"model": base}.get(source, source)
        objective = DPO(0.3, 0.1, reference, chunk_size=chunk_size)
        trainer = Trainer(model, optim.SGD(0.1), objective=objective, seed=0)
        histories.append(trainer.fit(batches, epochs=2, verbose=0).history)
        weights.append(dict(tree_flatten(model.trainable_parameters())))
    for key, values in histories[0].items():
        np.testing.assert_allclose(histories[1][key], values, rtol=1e-4, atol=1e-5, err_msg=key)
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "orpo, all trains"])
def test_chunks_of_preferences_have_a_smaller_peak(kind):
    """The logits of 1,024 tokens are 32 MB here, those of a chunk 1 MB."""
    rng, peaks = np.random.default_rng(0), {}
    tokens = rng.integers(0, 64, (4, 2, 128)).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    batch = PreferenceBatch(tokens, tokens, weights, np.zeros((4, 2), np.float32))
    for chunk_size in (None, 32):
        model = make_llama(vocab_size=8192, num_hidden_layers=1)
        if "all" not in kind:
            finetune.apply_lora(model)
        make = DPO if kind == "dpo" else ORPO
        trainer = Trainer(model, optim.SGD(0.1), objective=make(chunk_size=chunk_size))
        trainer.fit([batch], verbose=0)
        mx.reset_peak_memory()
        trainer.fit([batch], verbose=0)
        peaks[chunk_size] = mx.get_peak_memory()
    assert peaks[32] < 0.5 * peaks[None], peaks


def test_the_head_runs_for_the_answers_alone():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head, self.seen = nn.Embedding(128, 8), nn.Linear(8, 128), []

        def __call__(self, tokens):
            hidden = self.model(tokens)
            self.seen.append(hidden.shape[0] * hidden.shape[1])
            return self.head(hidden)

    model = Watched()
    rows = [{"prompt": "a" * 60, "chosen": "bc", "rejected": "de"}] * 4
    batches = PreferenceBatches(PreferenceDataset(rows, Letters()), 4, seed=0)
    Trainer(model, optim.SGD(0.1), objective=ORPO()).fit(batches, verbose=0)
    size = 4 * 2 * int(batches.widths[-1])
    assert model.seen[-1] == -(-size // 8)


def test_a_head_that_mixes_positions_sees_them_all_or_is_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)

        def __call__(self, tokens):
            logits = self.head(self.model(tokens))
            return logits - logits.mean(1, keepdims=True)

    model, rows = Mixing(), [{"prompt": "abcdefgh", "chosen": "ab", "rejected": "cd"}] * 3
    dataset = PreferenceDataset(rows, Letters())
    sums, counts = log_probs(model, dataset)
    found = Trainer(model, objective=ORPO()).evaluate(PreferenceBatches(dataset, 3), verbose=0)
    assert found["logps/chosen"] == pytest.approx((sums / counts)[:, 0].mean(), rel=1e-4)
    for make in (ORPO(chunk_size=4), DPO(chunk_size=4, reference="precomputed")):
        with pytest.raises(ConfigurationError, match="does not map each position by itself"):
            Trainer(model, objective=make).evaluate(PreferenceBatches(dataset, 4, 2), verbose=0)
    with pytest.raises(ConfigurationError, match="does not map each position by itself"):
        reference_log_probs(model, dataset, chunk_size=4)


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
    [
        {"beta": 0},
        {"beta": -1},
        {"label_smoothing": 0.5},
        {"reference": "base"},
        {"beta": "x"},
        {"chunk_size": 0},
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        DPO(**arguments)


def test_other_batches_are_told_what_is_expected():
    with pytest.raises(DataError, match="PreferenceBatches"):
        ORPO().host_weight((np.zeros((2, 3)), np.zeros((2, 3))))
