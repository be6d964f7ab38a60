"""The loss of an epoch is the same token for token, however its documents are batched."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from chat_templates import CHATML, tokenizer_with
from language_models import mlx_lm_model

from mlx_fit import DataLoader, Sums, Trainer
from mlx_fit.text import BucketBatches, PackedBatches, TextBatch, TextDataset, apply_packed


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    words = ["def", "return", "import", "self", "x", "y", "=", "(", ")", ":"]

    def said():
        return " ".join(rng.choice(words, rng.integers(1, 15)))

    def chat():
        turns = rng.integers(1, 3)
        return [
            {"role": role, "content": said()}
            for _ in range(turns)
            for role in ("user", "assistant")
        ]

    rows = [{"messages": chat()} for _ in range(30)]
    return TextDataset(rows, tokenizer_with(CHATML), max_length=60)


def losses_by_hand(model, dataset):
    """Each target's loss by (document, position)."""
    found = []
    for tokens, mask in dataset:
        logits = model(mx.array(tokens)[None] % 64)[0, :-1]
        losses = nn.losses.cross_entropy(logits, mx.array(tokens[1:]) % 64)
        found += np.array(losses)[mask[1:] == 1].tolist()
    return np.array(found)


def objective(model, batch):
    logits = apply_packed(model, batch.tokens % 64, batch.segments)
    losses = nn.losses.cross_entropy(logits, batch.targets % 64) * batch.weights
    return Sums(losses.sum(), batch.weights.sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda data: BucketBatches(data, 8, seed=0),
        lambda data: BucketBatches(data, 7, max_shapes=1, seed=0),
        lambda data: BucketBatches(data, 1, shuffle=False),
        lambda data: PackedBatches(data, 4, 64, seed=0),
        lambda data: PackedBatches(data, 3, 100, seed=0),
    ],
    ids=["bucket", "bucket of one shape", "one by one", "packed", "packed longer"],
)
def test_every_target_has_the_loss_of_its_own_run(dataset, make):
    model, losses = mlx_lm_model("llama"), []
    for batch in make(dataset):
        arrays = TextBatch(*map(mx.array, batch))
        logits = apply_packed(model, arrays.tokens % 64, arrays.segments)
        each = nn.losses.cross_entropy(logits, arrays.targets % 64)
        losses += np.array(each)[batch.weights == 1].tolist()
    expected = losses_by_hand(model, dataset)
    assert len(losses) == dataset.report().target_tokens
    assert np.allclose(np.sort(losses), np.sort(expected), atol=1e-5)


def test_a_trainer_sees_one_loss_and_learns_from_both(dataset):
    model = mlx_lm_model("llama")
    trainer = Trainer(model, optim.AdamW(1e-2), objective=objective, seed=0)
    loaders = [BucketBatches(dataset, 8, seed=0), PackedBatches(dataset, 4, 64, seed=0)]
    for loader in loaders:
        expected = losses_by_hand(model, dataset).mean()
        assert np.isclose(trainer.evaluate(loader, verbose=0)["loss"], expected, rtol=1e-5)
        history = trainer.fit(loader, epochs=2, verbose=0)
        assert history.history["loss"][-1] < history.history["loss"][0]


def test_padding_takes_part_in_nothing_without_segments_too(dataset):
    """A model with causal attention needs no mask for rows that are padded on the right."""
    model, total, weight = mlx_lm_model("gpt2"), 0.0, 0.0
    for batch in BucketBatches(dataset, 8, seed=0):
        losses = nn.losses.cross_entropy(
            model(mx.array(batch.tokens) % 64), mx.array(batch.targets) % 64
        )
        total += (np.array(losses) * batch.weights).sum()
        weight += batch.weights.sum()
    assert np.isclose(total / weight, losses_by_hand(model, dataset).mean(), rtol=1e-5)


def test_a_text_dataset_is_a_dataset_for_others_too(dataset):
    loader = DataLoader(dataset, batch_size=4, collate_fn=lambda rows: [len(t) for t, _ in rows])
    assert np.concatenate(list(loader)).tolist() == dataset.lengths.tolist()
