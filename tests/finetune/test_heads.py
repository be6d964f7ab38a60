"""Classes and vectors of whole sequences, against each sequence's own run and PyTorch."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from llama import make_llama

from mlx_fit import Trainer, finetune
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.finetune import Embedder, InfoNCE, SequenceClassifier, pad_tokens

ROWS = [[5, 7, 9, 11], [3], [2, 4, 6, 8, 10, 12], [1, 1]]


def small():
    return make_llama(num_hidden_layers=1)


def hidden_of(model, row):
    return np.array(model.model(mx.array([row])))[0]


def pooled(model, pooling):
    states = [hidden_of(model, row) for row in ROWS]
    return np.stack([h[-1] if pooling == "last" else h.mean(0) for h in states])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_changes_neither_classes_nor_vectors(pooling):
    model = small()
    batch = {key: mx.array(value) for key, value in pad_tokens(ROWS, length=9).items()}
    expected = pooled(model, pooling)
    classifier = SequenceClassifier(model, 3, pooling)
    by_hand = expected @ np.array(classifier.head.weight).T + np.array(classifier.head.bias)
    np.testing.assert_allclose(classifier(**batch), by_hand, atol=1e-5)
    unit = torch.nn.functional.normalize(torch.tensor(expected)).numpy()
    np.testing.assert_allclose(Embedder(model, pooling)(**batch), unit, atol=1e-5)
    plain = Embedder(model, pooling, normalize=False)
    np.testing.assert_allclose(plain(**batch), expected, atol=1e-5)


def test_without_a_mask_every_token_counts():
    model, tokens = small(), mx.array([[5, 7, 9], [2, 4, 6]])
    ones = mx.ones(tokens.shape)
    for pooling in ("last", "mean"):
        embedder = Embedder(model, pooling)
        np.testing.assert_allclose(embedder(tokens), embedder(tokens, ones), atol=1e-6)


def test_info_nce_is_that_of_pytorch():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 6, 4)).astype(np.float32)

    class Given(nn.Module):
        def __call__(self, vectors):
            return vectors

    batch = {"vectors": mx.array(first)}, {"vectors": mx.array(second)}
    loss, metrics = InfoNCE(0.2)(Given(), batch)
    logits, own = torch.tensor(first) @ torch.tensor(second).T / 0.2, torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(logits, own) + entropy(logits.T, own)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["accuracy"].item() == (logits.argmax(1) == own).float().mean().item()


def test_a_classifier_with_adapters_learns_and_keeps_its_base():
    model = small()
    finetune.apply_lora(model)
    classifier = SequenceClassifier(model, 2)
    before = np.array(model.model.embed_tokens.weight)
    names = {name.split(".")[-1] for name, _ in _trained(classifier)}
    assert names == {"lora_a", "lora_b", "weight", "bias"}
    rng = np.random.default_rng(0)
    ends = zip([2, 4] * 16, [70, 90] * 16, strict=True)  # the last token tells the class
    x = pad_tokens([[*rng.integers(0, 60, count).tolist(), end] for count, end in ends])
    y = np.array([0, 1] * 16)
    trainer = Trainer(classifier, optim.Adam(0.01), "cross_entropy", ["accuracy"], seed=0)
    trainer.fit((x, y), epochs=30, verbose=0)
    assert trainer.evaluate((x, y), verbose=0)["accuracy"] == 1.0
    assert np.array_equal(model.model.embed_tokens.weight, before)


def _trained(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.trainable_parameters())


def test_an_embedder_learns_which_texts_belong_together():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 100, rng.integers(2, 6)).tolist() for _ in range(16)]
    partners = [rng.integers(0, 100, 3).tolist() for _ in texts]
    model = small()
    finetune.apply_lora(model)
    trainer = Trainer(
        Embedder(model), optim.Adam(0.003), objective=InfoNCE(0.1), batch_size=8, seed=0
    )
    data = pad_tokens(texts), pad_tokens(partners)
    history = trainer.fit(data, epochs=25, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["accuracy"][-1] > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceClassifier(small(), 0), "num_classes=0"),
        (lambda: SequenceClassifier(small(), 2, "max"), "pooling='max'"),
        (lambda: SequenceClassifier(nn.Linear(2, 2), 2), "has no embedding"),
        (lambda: Embedder("model"), "expected an mlx.nn.Module"),
        (lambda: InfoNCE(0), "temperature=0"),
        (lambda: Embedder(nn.Linear(2, 2))(mx.zeros((1, 2))), "expected hidden states"),
    ],
)
def test_what_cannot_work_is_told(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "no rows"), ([[1], []], "row 1 is empty"), ([[1.5]], "row 0 holds float64")],
)
def test_rows_without_tokens_are_told(rows, message):
    with pytest.raises(DataError, match=message):
        pad_tokens(rows)


def test_a_quantized_model_has_the_width_of_its_unpacked_embedding():
    model = small()
    nn.quantize(model, group_size=32, bits=4)
    assert SequenceClassifier(model, 2)(mx.array([[1, 2]])).shape == (1, 2)
