"""Models of mlx-lm on packed rows, against each document's own run."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from language_models import WithSegments, mlx_lm_model

from mlx_fit import CausalLM, Trainer
from mlx_fit.errors import ConfigurationError
from mlx_fit.text import (
    BucketBatches,
    PackedBatches,
    TextBatch,
    apply_packed,
    check_packing,
    is_packed,
)
from mlx_fit.text.packed_model import SegmentCache


def packed(batch_size, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(1, 64, n), np.ones(n)) for n in rng.integers(2, 20, 40)]
    return next(iter(PackedBatches(rows, batch_size, 32, seed=seed)))


def worst_difference(model, batch):
    """By hand: every document by itself."""
    together = np.array(apply_packed(model, mx.array(batch.tokens), mx.array(batch.segments)))
    found = []
    for row, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            where = segments == number
            alone = np.array(model(mx.array(batch.tokens[row][where])[None]))[0]
            found.append(np.abs(together[row][where] - alone).max())
    return max(found)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_logits_are_those_of_each_documents_own_run(family, batch_size):
    model, batch = mlx_lm_model(family), packed(batch_size)
    expected = worst_difference(model, batch)
    assert expected < 1e-4
    assert np.isclose(check_packing(model, batch), expected, atol=1e-6)


def test_without_segments_documents_see_each_other():
    batch = packed(2)
    everything = batch._replace(segments=np.ones_like(batch.segments))
    model = mlx_lm_model("llama")
    logits = [
        apply_packed(model, *map(mx.array, (b.tokens, b.segments))) for b in (batch, everything)
    ]
    assert mx.abs(logits[0] - logits[1]).max() > 0.1


@pytest.mark.parametrize(
    ("family", "batch_size", "text"),
    [
        ("gemma2", 2, "the logits of document 1 in row 1 differ by"),  # as many as key-value heads
        ("gemma2", 4, "it failed with a block mask for 4 rows: .*broadcast"),
        ("gpt2", 1, "the logits of document 2 in row 0 differ by"),
        ("mamba", 1, r"it has a recurrent state \(ArraysCache\)"),
    ],
)
def test_models_that_packing_would_make_wrong_are_refused(family, batch_size, text):
    with pytest.raises(
        ConfigurationError, match=f"{family} cannot be trained on packed rows: {text}"
    ):
        check_packing(mlx_lm_model(family), packed(batch_size))


def test_a_batch_of_single_documents_tells_as_much():
    tokens = np.arange(1, 33).reshape(1, 32).astype(np.int32)
    batch = TextBatch(tokens, tokens, np.ones((1, 32)), np.ones((1, 32), np.int32))
    assert check_packing(mlx_lm_model("llama"), batch) < 1e-4
    with pytest.raises(ConfigurationError, match="document 2 in row 0"):
        check_packing(mlx_lm_model("gpt2"), batch)
    assert batch.segments.max() == 1, "the batch itself is left alone"


def test_a_model_that_takes_segments_gets_them_and_keeps_its_modes():
    model = WithSegments()
    model.attention.eval()
    assert check_packing(model, packed(3)) < 1e-4, "without dropout"
    assert (model.training, model.dropout.training, model.attention.training) == (True, True, False)
    with pytest.raises(ConfigurationError, match="WithSegments cannot be trained on packed rows"):
        check_packing(WithSegments(ignores=True), packed(3))


def test_half_precision_is_allowed_its_rounding():
    model = mlx_lm_model("llama")
    model.set_dtype(mx.bfloat16)
    assert 1e-4 < check_packing(model, packed(4)) < 0.1
    model = mlx_lm_model("gpt2")
    model.set_dtype(mx.bfloat16)
    with pytest.raises(ConfigurationError, match="differ by"):
        check_packing(model, packed(4))


def test_nan_is_no_agreement():
    model = mlx_lm_model("llama")
    model.model.norm.weight = model.model.norm.weight * mx.nan
    with pytest.raises(ConfigurationError, match="differ by nan"):
        check_packing(model, packed(1))


class Plain(nn.Module):
    def __call__(self, tokens):
        return tokens


class Cached(nn.Module):
    def __call__(self, tokens, cache=None):
        return tokens


def test_a_model_that_takes_neither_is_refused():
    tokens = mx.zeros((1, 4), mx.int32)
    with pytest.raises(ConfigurationError, match=r"Plain .* neither an argument 'segments' nor"):
        apply_packed(Plain(), tokens, tokens)
    with pytest.raises(ConfigurationError, match=r"Cached .* neither make_cache\(\) nor layers"):
        apply_packed(Cached(), tokens, tokens)


def test_the_mask_is_a_block_for_each_document_within_a_window():
    segments = mx.array([[1, 1, 1, 2, 2, 0]])
    for window in (None, 2):
        mask = np.array(SegmentCache(segments).make_mask(6, window_size=window))
        for i in range(6):
            for j in range(6):
                same = segments[0, i].item() == segments[0, j].item()
                assert mask[0, 0, i, j] == (same and j <= i and (window is None or i - j < window))


def test_a_batch_with_one_document_a_row_is_not_packed():
    rows = [([1, 2, 3], [1, 1, 1]), ([4, 5], [1, 1])]
    assert not is_packed(next(iter(BucketBatches(rows, 2))))
    assert is_packed(next(iter(PackedBatches(rows, 2, 8))))


def test_it_can_be_compiled_and_differentiated():
    model, batch = mlx_lm_model("llama"), packed(2)
    arrays = [mx.array(part) for part in batch]

    def loss(tokens, targets, weights, segments):
        logits = apply_packed(model, tokens, segments)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum() / weights.sum()

    gradient = nn.value_and_grad(model, loss)
    compiled = mx.compile(loss)
    assert np.isclose(compiled(*arrays).item(), gradient(*arrays)[0].item(), rtol=1e-5)


def test_a_model_that_mixes_packed_documents_up_is_refused_before_training():
    model = WithSegments(ignores=True)
    before = np.array(model.embedding.weight)
    documents = [([1 + i, 2, 3 + i], [1, 1, 1]) for i in range(6)]
    trainer = Trainer(model, optim.SGD(0.1), objective=CausalLM())
    with pytest.raises(ConfigurationError, match="cannot be trained on packed rows"):
        trainer.fit(PackedBatches(documents, 2, 7, seed=0), verbose=0)
    assert np.array_equal(model.embedding.weight, before)
    model = WithSegments()
    Trainer(model, optim.SGD(0.1), objective=CausalLM()).fit(
        PackedBatches(documents, 2, 7, seed=0), verbose=0
    )
