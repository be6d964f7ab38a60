"""The objective of language models, against NumPy and against the whole logits."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import TextBatch, make_llama, text_batches
from mlx.utils import tree_flatten

from mlx_fit import CausalLM, ConfigurationError, DataError, Trainer
from mlx_fit.data import DataLoader, Subset


class Bigram(nn.Module):
    """Logits are a row of a table, so that NumPy can follow."""

    def __init__(self, rng, classes=7):
        super().__init__()
        self.table = mx.array(rng.normal(size=(classes, classes)), mx.float32)

    def __call__(self, tokens):
        return self.table[tokens]


def a_batch(rng, rows=3, length=5, classes=7):
    tokens = rng.integers(0, classes, (rows, length))
    targets = rng.integers(0, classes, (rows, length))
    weights = rng.choice([0.0, 1.0, 0.5], (rows, length)).astype(np.float32)
    return TextBatch(tokens, targets, weights, np.ones((rows, length), np.int32))


def by_hand(logits, targets, weights, smoothing=0.0, z=0.0):
    """Mean loss and mean negative log-likelihood in float64."""
    logits = logits.astype(np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    log_p = logits - lse[..., None]
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    loss = (1 - smoothing) * nll - smoothing * log_p.mean(-1) + z * lse**2
    return (loss * weights).sum() / weights.sum(), (nll * weights).sum() / weights.sum()


def evaluate(model, batches, **options):
    return Trainer(model, objective=CausalLM(**options)).evaluate(batches, verbose=0)


def gradients(model, batch, **options):
    arrays = TextBatch(*[mx.array(part) for part in batch])
    objective = CausalLM(**options)
    loss, found = nn.value_and_grad(model, lambda m: objective(m, arrays).mean)(model)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(found)}


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("smoothing", "z"), [(0, 0), (0.1, 0), (0, 0.01), (0.2, 0.02)])
def test_loss_and_perplexity_are_numpys(rng, smoothing, z):
    model, batch = Bigram(rng), a_batch(rng)
    found = evaluate(model, [batch], label_smoothing=smoothing, z_loss=z)
    logits = np.array(model.table)[batch.tokens]
    loss, nll = by_hand(logits, batch.targets, batch.weights, smoothing, z)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)


def test_accuracy_and_tokens_are_counted_by_weight(rng):
    model, batch = Bigram(rng), a_batch(rng)
    found = evaluate(model, [batch])
    correct = np.array(model.table)[batch.tokens].argmax(-1) == batch.targets
    weights = batch.weights
    assert found["accuracy"] == pytest.approx((correct * weights).sum() / weights.sum(), rel=1e-6)
    assert found["num_tokens"] == (weights > 0).sum()


def test_batches_of_different_weight_are_one_big_batch(rng):
    model, batch = Bigram(rng), a_batch(rng, rows=4)
    parts = [TextBatch(*[a[:1] for a in batch]), TextBatch(*[a[1:] for a in batch])]
    whole, cut = evaluate(model, [batch]), evaluate(model, parts)
    assert cut == {key: pytest.approx(value, rel=1e-5) for key, value in whole.items()}


def test_accumulation_weighs_tokens(rng):
    batch = a_batch(rng, rows=4)
    parts = [TextBatch(*[a[:1] for a in batch]), TextBatch(*[a[1:] for a in batch])]
    tables = []
    for batches, accumulation in (([batch], 1), (parts, 2)):
        model = Bigram(np.random.default_rng(3))
        options = {"objective": CausalLM(), "gradient_accumulation": accumulation}
        Trainer(model, optim.SGD(1.0), **options).fit(batches, verbose=0)
        tables.append(np.array(model.table))
    np.testing.assert_allclose(*tables, atol=1e-6)


def test_what_does_not_count_may_hold_anything(rng):
    model, batch = Bigram(rng), a_batch(rng)
    for other in (-100, 2_000_000_000):
        targets = np.where(batch.weights > 0, batch.targets, other)
        assert evaluate(model, [batch._replace(targets=targets)]) == evaluate(model, [batch])


def test_tuples_and_row_weights_are_batches_too(rng):
    model, batch = Bigram(rng), a_batch(rng)
    rows = np.array([1.0, 0.0, 2.0], np.float32)
    spread = np.broadcast_to(rows[:, None], batch.tokens.shape)
    by_row = evaluate(model, [(batch.tokens, batch.targets, rows)])
    assert by_row == evaluate(model, [(batch.tokens, batch.targets, spread)])
    ones = np.ones(batch.tokens.shape, np.float32)
    assert evaluate(model, [batch[:2]]) == evaluate(model, [batch._replace(weights=ones)])


def test_a_batch_of_no_weight_is_no_update(rng):
    model, batch = Bigram(rng), a_batch(rng)
    before = np.array(model.table)
    empty = batch._replace(weights=np.zeros_like(batch.weights))
    Trainer(model, optim.SGD(1.0), objective=CausalLM()).fit([empty], verbose=0)
    assert (np.array(model.table) == before).all()


def test_half_precision_logits_give_a_float32_loss(rng):
    model, batch = Bigram(rng), a_batch(rng)
    model.table = model.table.astype(mx.bfloat16)
    logits = np.array(model.table.astype(mx.float32))[batch.tokens]
    loss, _ = by_hand(logits, batch.targets, batch.weights)
    assert evaluate(model, [batch])["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_auxiliary_loss_is_added_once_a_batch(rng):
    model, batch = Bigram(rng), a_batch(rng)
    plain = evaluate(model, [batch])["loss"]
    found = evaluate(model, [batch, batch], aux_loss=lambda model, outputs: mx.array(0.25))
    assert found["loss"] == pytest.approx(plain + 0.25, rel=1e-6)
    assert found["aux_loss"] == 0.25


def test_the_auxiliary_loss_sees_what_the_model_returns(rng):
    class Routed(Bigram):
        def __call__(self, tokens):
            logits = super().__call__(tokens)
            return logits, logits.square().mean()

    model, batch = Routed(rng), a_batch(rng)
    found = evaluate(model, [batch], aux_loss=lambda model, outputs: outputs[1])
    table = np.array(model.table)[batch.tokens]
    assert found["aux_loss"] == pytest.approx((table**2).mean(), rel=1e-5)


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 10_000])
def test_chunks_have_the_loss_and_gradients_of_the_whole(tied, chunk_size):
    model, [batch] = make_llama(tie_word_embeddings=tied), text_batches(1)
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    loss, expected = gradients(model, batch, **options)
    for training in (True, False):
        model.train(training)
        chunked, found = gradients(model, batch, chunk_size=chunk_size, **options)
        assert chunked == pytest.approx(loss, rel=1e-6)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_chunks_train_in_mixed_precision_as_the_whole_does(precision):
    losses = []
    for chunk_size in (None, 7):
        objective = CausalLM(chunk_size=chunk_size)
        options = {"objective": objective, "precision": precision, "compile": False}
        trainer = Trainer(make_llama(num_hidden_layers=1), optim.SGD(0.5), **options)
        losses.append(trainer.fit(text_batches(), epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=5e-3)


def test_chunks_have_a_smaller_peak():
    """The logits of 1,024 tokens are 16 MB here, those of a chunk 1 MB."""
    peaks = {}
    for chunk_size in (None, 64):
        model = make_llama(vocab_size=4096)
        trainer = Trainer(model, optim.SGD(0.1), objective=CausalLM(chunk_size=chunk_size))
        batches = text_batches(2, rows=8, length=128)
        trainer.fit(batches, verbose=0)
        mx.reset_peak_memory()
        trainer.fit(batches, verbose=0)
        peaks[chunk_size] = mx.get_peak_memory()
    assert peaks[64] < 0.6 * peaks[None], peaks


def test_a_quantized_head_is_chunked():
    model, [batch] = make_llama(), text_batches(1)
    nn.quantize(model, 32, 4, class_predicate=lambda name, _: name == "lm_head")
    loss, expected = gradients(model, batch)
    chunked, found = gradients(model, batch, chunk_size=7)
    assert chunked == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(found["model.norm.weight"], expected["model.norm.weight"], atol=1e-6)


def test_what_a_model_does_after_its_head_is_kept():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Embedding(128, 16)
            self.lm_head = nn.Linear(16, 128)
            self.scale = mx.array(3.0)

        def __call__(self, tokens):
            return self.scale * mx.tanh(self.lm_head(self.model(tokens)))

    model, [batch] = Capped(), text_batches(1)
    loss, expected = gradients(model, batch)
    chunked, found = gradients(model, batch, chunk_size=5)
    assert chunked == pytest.approx(loss, rel=1e-6)
    assert found["scale"] == pytest.approx(expected["scale"], rel=1e-4)


class Odd(nn.Module):
    def __init__(self, body="model", twice=False, mixes=False):
        super().__init__()
        self[body] = nn.Embedding(128, 8)
        self.head = nn.Linear(8, 128)
        self.body, self.twice, self.mixes = body, twice, mixes

    def __call__(self, tokens):
        hidden = self[self.body](tokens)
        if self.twice:
            hidden = hidden + self[self.body](tokens)
        logits = self.head(hidden)
        return logits - logits.mean(1, keepdims=True) if self.mixes else logits


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"body": "encoder"}, "its children are encoder, head"),
        ({"twice": True}, "called 2 times"),
        ({"mixes": True}, "does not map each position by itself"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(options, text):
    [batch] = text_batches(1)
    with pytest.raises(ConfigurationError, match=text):
        gradients(Odd(**options), batch, chunk_size=5)


# --- batches that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"targets": np.full((3, 5), 7)}, r"targets\[0, 0\] is 7; expected 0 to 6"),
        ({"targets": np.full((3, 5), -100)}, r"targets\[0, 0\] is -100.*weight to 0"),
        ({"tokens": np.full((3, 5), -1)}, r"tokens\[0, 0\] is -1"),
        ({"tokens": np.zeros((3, 4), int)}, r"targets have shape \(3, 5\), tokens \(3, 4\)"),
        ({"tokens": np.zeros((3, 5))}, "tokens have shape .* float64; expected integers"),
        ({"weights": np.ones((5, 3))}, "weights have shape"),
        ({"weights": np.full((3, 5), -1.0)}, "expected numbers of at least 0"),
    ],
)
def test_a_batch_that_cannot_be_right_is_refused(rng, change, text):
    batch = a_batch(rng)._replace(weights=np.ones((3, 5), np.float32))._replace(**change)
    with pytest.raises(DataError, match=text):
        evaluate(Bigram(rng), [batch])


def test_tokens_beyond_the_embedding_are_refused():
    [batch] = text_batches(1)
    tokens = batch.tokens.copy()
    tokens[1, 2] = 128
    with pytest.raises(DataError, match=r"tokens\[1, 2\] is 128; expected 0 to 127"):
        evaluate(make_llama(), [batch._replace(tokens=tokens)])


def test_other_batches_are_told_what_is_expected(rng):
    with pytest.raises(DataError, match="NamedTuple with the fields tokens"):
        evaluate(Bigram(rng), [a_batch(rng).tokens])


def test_packed_rows_need_a_model_that_takes_segments(rng):
    batch = a_batch(rng)._replace(weights=np.ones((3, 5), np.float32))
    packed = batch._replace(segments=np.array([[1, 1, 2, 2, 2]] * 3))
    with pytest.raises(ConfigurationError, match="neither an argument 'segments'"):
        evaluate(Bigram(rng), [packed])

    class Aware(Bigram):
        def __call__(self, tokens, segments=None):
            logits = super().__call__(tokens)
            return logits if segments is None else logits * segments[..., None]

    model = Aware(rng)
    logits = np.array(model.table)[batch.tokens]
    loss, _ = by_hand(logits * packed.segments[..., None], batch.targets, batch.weights)
    assert evaluate(model, [packed])["loss"] == pytest.approx(loss, rel=1e-5)
    loss, _ = by_hand(logits, batch.targets, batch.weights)
    assert evaluate(model, [batch])["loss"] == pytest.approx(loss, rel=1e-5)


def test_padding_with_a_segment_of_its_own_is_not_packing(rng):
    batch = a_batch(rng)
    weights = np.array([[1, 1, 1, 0, 0]] * 3, np.float32)
    padded = batch._replace(weights=weights, segments=np.array([[1, 1, 1, 0, 0]] * 3))
    assert "loss" in evaluate(Bigram(rng), [padded])


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": True},
        {"z_loss": -1},
        {"chunk_size": 0},
        {"chunk_size": 2.5},
        {"aux_loss": 0.1},
    ],
)
def test_arguments_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CausalLM(**options)


def test_logits_of_another_shape_are_refused(rng):
    with pytest.raises(ConfigurationError, match="expects logits of shape"):
        evaluate(Last(rng), [a_batch(rng)])


class Last(Bigram):
    def __call__(self, tokens):
        return super().__call__(tokens)[:, -1]


def test_directions_are_known():
    assert CausalLM().directions["perplexity"] is False
    assert CausalLM().directions["accuracy"] is True


def test_a_mask_is_not_taken_for_targets():
    rows = [(np.array([1, 2, 3], np.int32), np.array([0, 1, 1], np.uint8))] * 2
    trainer = Trainer(make_llama(), optim.SGD(0.1), objective=CausalLM(), batch_size=2, seed=0)
    for data in (DataLoader(rows, 2), Subset(rows, [0, 1])):
        with pytest.raises(DataError, match=r"mask of a TextDataset.*BucketBatches"):
            trainer.fit(data, verbose=0)


def test_rows_as_lists_are_refused_in_words():
    trainer = Trainer(make_llama(), optim.SGD(0.1), objective=CausalLM())
    with pytest.raises(DataError, match=r"tokens are a list; expected an array"):
        trainer.fit([([[1, 2, 3]], [[2, 3, 4]])], verbose=0)


def test_bytes_may_be_tokens_and_targets():
    tokens = np.array([[1, 2, 3]], np.uint8)
    trainer = Trainer(make_llama(), optim.SGD(0.1), objective=CausalLM())
    assert trainer.evaluate([(tokens, tokens)], verbose=0)["num_tokens"] == 3
