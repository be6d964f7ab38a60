"""The head runs for the positions that count: which these are, and the result of a plain loop."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from llama import TextBatch, make_llama
from mlx.utils import tree_flatten

from mlx_fit import CausalLM, ConfigurationError, Trainer
from mlx_fit.chunked_loss import TokenLoss
from mlx_fit.counted import capacity, positions


@pytest.mark.parametrize(
    ("counted", "kept"),
    [(0, 5), (1, 5), (5, 5), (6, 10), (11, 20), (20, 20), (21, 30), (30, 30), (31, None)],
)
def test_positions_are_kept_in_five_shares_of_the_batch(counted, kept):
    weights = np.zeros(40, np.float32)
    weights[:counted] = 0.5
    assert capacity(weights.reshape(4, 10), (4, 10)) == kept


def test_a_shape_is_traced_five_times_at_most(rng):
    model, options = make_llama(num_hidden_layers=1), {"objective": CausalLM(), "seed": 0}
    trainer = Trainer(model, optim.SGD(0.1), **options)
    batches = [a_batch(rng, share=share / 40) for share in range(1, 41)]
    kept = {capacity(batch.weights, batch.weights.shape) for batch in batches}
    trainer.fit(batches, verbose=0)
    assert trainer._train_step.num_traces == len(kept) <= 5


def test_weights_of_rows_and_no_weights_are_understood():
    assert capacity(np.array([1.0, 0, 0, 0]), (4, 10)) == 10
    assert capacity(None, (4, 10)) is None


def test_all_that_counts_is_kept_in_its_order(rng):
    weights = rng.choice([0.0, 0.0, 2.0], 50).astype(np.float32)
    kept = capacity(weights[None], (1, 50))
    found = np.array(positions(mx.array(weights), kept)).tolist()
    counted = np.flatnonzero(weights).tolist()
    assert found[: len(counted)] == counted
    assert len(found) == len(set(found)) == kept


def a_batch(rng, rows=3, length=16, share=0.4):
    tokens = rng.integers(0, 128, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < share).astype(np.float32)
    weights[0, 0] = 1.0
    segments = np.ones((rows, length), np.int32)
    return TextBatch(tokens[:, :-1], tokens[:, 1:], weights, segments)


def plain(model, batch):
    """The loss and its gradients by MLX's own functions, from all logits."""
    tokens, targets, weights, _ = (mx.array(part) for part in batch)

    def loss(model):
        each = nn.losses.cross_entropy(model(tokens), targets)
        return (each * weights).sum() / weights.sum()

    value, found = nn.value_and_grad(model, loss)(model)
    return value.item(), dict(tree_flatten(found))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 7, 1000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_and_gradients_are_those_of_a_plain_loop(rng, tied, chunk_size, share):
    model, batch = (
        make_llama(num_hidden_layers=1, tie_word_embeddings=tied),
        a_batch(rng, share=share),
    )
    expected_loss, expected = plain(model, batch)
    arrays, objective = TextBatch(*map(mx.array, batch)), CausalLM(chunk_size=chunk_size)
    loss, found = nn.value_and_grad(model, lambda m: objective(m, arrays).mean)(model)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    for name, value in tree_flatten(found):
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)


def fitted(model, batches, **options):
    trainer = Trainer(model, optim.SGD(0.1), objective=CausalLM(**options), seed=0)
    return trainer.fit(batches, epochs=2, verbose=0).history


def looped(model, batches):
    for batch in batches * 2:
        found = plain(model, batch)[1]
        for name, value in tree_flatten(model.trainable_parameters()):
            model.load_weights([(name, value - 0.1 * found[name])], strict=False)
    return model


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_compiled_fit_gives_the_weights_of_a_plain_loop(rng, chunk_size):
    batches = [a_batch(rng, share=share) for share in (0.1, 0.6, 0.3, 1.0)]
    model = make_llama(num_hidden_layers=1)
    fitted(model, batches, chunk_size=chunk_size)
    expected = dict(tree_flatten(looped(make_llama(num_hidden_layers=1), batches).parameters()))
    for name, value in tree_flatten(model.parameters()):
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


class Watched(nn.Module):
    """Notes how many positions its head was given."""

    def __init__(self, mixes=False):
        super().__init__()
        self.model, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)
        self.mixes, self.seen = mixes, []

    def __call__(self, tokens):
        hidden = self.model(tokens)
        self.seen.append(hidden.shape[0] * hidden.shape[1])
        logits = self.head(hidden)
        return logits - logits.mean(1, keepdims=True) if self.mixes else logits


def test_the_head_runs_for_the_positions_that_count(rng):
    model, batch = Watched(), a_batch(rng)
    fitted(model, [batch])
    kept = capacity(batch.weights, batch.weights.shape)
    assert kept < 30
    assert model.seen[-1] == kept


def test_a_head_that_mixes_positions_sees_them_all(rng):
    model, batches = Watched(mixes=True), [a_batch(rng), a_batch(rng)]
    before = dict(tree_flatten(model.parameters()))
    fitted(model, batches)
    other = Watched(mixes=True)
    other.load_weights(list(before.items()))
    expected = dict(tree_flatten(looped(other, batches).parameters()))
    assert model.seen[-1] == 48
    np.testing.assert_allclose(model.head.weight, expected["head.weight"], atol=1e-6)


def test_chunks_of_a_head_that_mixes_are_refused_by_fit(rng):
    with pytest.raises(ConfigurationError, match="does not map each position by itself"):
        fitted(Watched(mixes=True), [a_batch(rng)], chunk_size=8)


def test_evaluation_before_any_fit_looks_at_the_head_too(rng):
    model, batch = Watched(mixes=True), a_batch(rng)
    found = Trainer(model, objective=CausalLM()).evaluate([batch], verbose=0)
    assert found["loss"] == pytest.approx(plain(model, batch)[0], rel=1e-5)


def test_a_batch_of_more_targets_is_whole_after_a_fit(rng):
    model, objective = make_llama(num_hidden_layers=1), CausalLM()
    trainer = Trainer(model, optim.SGD(0.1), objective=objective)
    trainer.fit([a_batch(rng, share=0.1)], verbose=0)
    batch = a_batch(rng, share=0.9)
    found = objective(model, TextBatch(*map(mx.array, batch))).mean.item()
    assert found == pytest.approx(plain(model, batch)[0], rel=1e-5)


def test_looking_at_the_head_draws_no_random_number(rng):
    class Dropping(Watched):
        def __call__(self, tokens):
            return nn.Dropout(0.5)(super().__call__(tokens))

    model = Dropping()
    mx.random.seed(3)
    before = np.array(mx.random.state[0])
    CausalLM().start(model)
    np.testing.assert_array_equal(np.array(mx.random.state[0]), before)
    assert model.training


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_one_pass_over_the_exponentials_keeps_the_digits(rng, scale):
    """The log of the sum of exponentials comes from the largest probability."""
    logits = mx.array(rng.normal(size=(6, 50)) * scale, mx.float32)
    targets, weights = mx.array(rng.integers(0, 50, 6)), mx.array(rng.random(6), mx.float32)
    fused = TokenLoss(0.1, 1e-4).fused(targets, weights)
    loss, slope = mx.value_and_grad(lambda x: fused(x)[0])(logits)
    whole = TokenLoss(0.1, 1e-4)
    expected, grad = mx.value_and_grad(lambda x: whole.sums(x, targets, weights).loss)(logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(slope, grad, rtol=1e-4, atol=1e-6 * max(1, scale * 1e-2))
