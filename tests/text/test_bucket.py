"""BucketBatches: what is in a batch, its order over epochs, and going on where it was left."""

from __future__ import annotations

import json

import numpy as np
import pytest
from chat_templates import Bytes

from mlx_fit.errors import ConfigurationError, DataError, ResumeError
from mlx_fit.text import BucketBatches, PackedBatches, TextBatch, TextDataset


def documents(lengths):
    """Documents of different tokens: 100 i, 100 i + 1, ..., all of them targets."""
    return [(100 * i + np.arange(n), np.ones(n)) for i, n in enumerate(lengths, 1)]


@pytest.fixture
def rows(rng):
    return documents(rng.lognormal(2.5, 0.7, 103).astype(int) + 1)


def first_tokens(batches):
    """Which documents each batch holds, in their order."""
    return [batch.tokens[:, 0].tolist() for batch in batches]


def shapes(batches):
    return [batch.tokens.shape for batch in batches]


def test_a_batch_holds_tokens_shifted_targets_weights_and_segments():
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 9], [1, 1])]
    (batch,) = BucketBatches(rows, 2, shuffle=False)
    assert isinstance(batch, TextBatch)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 9, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 0], [9, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [part.dtype for part in batch] == [np.int32, np.int32, np.float32, np.int32]


@pytest.mark.parametrize(("prompt", "targets"), [(0, 3), (2, 2)])
def test_a_document_of_4_tokens_has_3_targets_whatever_the_padding(prompt, targets):
    rows = [([7, 7, 7, 7], [0] * prompt + [1] * (4 - prompt)), ([7] * 8, [0] * 8)]
    (batch,) = BucketBatches(rows, 2)
    assert batch.tokens.shape == (2, 8)
    assert batch.weights.sum() == targets


def test_an_eos_that_is_also_the_padding_is_learned():
    tokenizer = Bytes()
    tokenizer.eos_token_id = 0
    (batch,) = BucketBatches(TextDataset(["ab", "abcdef"], tokenizer), 2, shuffle=False)
    assert batch.tokens[0].tolist() == [256, 97, 98, 0, 0, 0, 0, 0]
    assert batch.weights[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.targets[0, 2] == 0, "the EOS"


@pytest.mark.parametrize("max_shapes", [1, 2, 3, 8, 32])
def test_shapes_stay_within_their_bound_over_epochs(rows, max_shapes):
    loader = BucketBatches(rows, 8, max_shapes, seed=0)
    seen = [shapes(loader) for _ in range(4)]
    assert len({shape for epoch in seen for shape in epoch}) <= max_shapes
    assert {len(epoch) for epoch in seen} == {len(loader)} == {13}


def test_each_epoch_has_every_document_once_in_another_order(rows):
    loader = BucketBatches(rows, 8, seed=0)
    epochs = [first_tokens(loader) for _ in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == [tokens[0] for tokens, _ in rows]
    assert len({str(epoch) for epoch in epochs}) == 3
    again = BucketBatches(rows, 8, seed=0)
    np.random.default_rng(1)
    assert [first_tokens(again) for _ in range(3)] == epochs
    assert first_tokens(BucketBatches(rows, 8, seed=1)) != epochs[0]
    again.set_epoch(1)
    assert first_tokens(again) == epochs[1]


def test_without_shuffle_epochs_are_alike(rows):
    loader = BucketBatches(rows, 8, shuffle=False)
    assert first_tokens(loader) == first_tokens(loader)


def test_the_widest_batch_comes_first_and_the_largest_with_it(rows):
    loader = BucketBatches(rows, 8, seed=0)
    for _ in range(5):
        widths = [shape[1] for shape in shapes(loader)]
        assert widths[0] == max(widths)
    uneven = BucketBatches(documents([90, *[30] * 4, *[5] * 12]), 4, seed=0)
    assert shapes(uneven)[:2] == [(1, 90), (4, 30)]


def test_lengths_are_those_of_tokens():
    rows = [{"text": "x" * (n - 2)} for n in (166, 135, 251)]
    assert BucketBatches(TextDataset(rows, Bytes()), 1).widths.tolist() == [135, 166, 251]


def test_fewer_rows_than_a_batch_are_one_batch():
    assert shapes(BucketBatches(documents([3, 9]), 8)) == [(2, 9)]


@pytest.mark.parametrize("kind", ["bucket", "packed"])
class TestPosition:
    """Both loaders keep their position as DataLoader does."""

    @pytest.fixture
    def make(self, rows, kind):
        def make(seed=0, rows=rows, **options):
            if kind == "bucket":
                return BucketBatches(rows, seed=seed, **({"batch_size": 8} | options))
            return PackedBatches(rows, row_length=64, seed=seed, **({"batch_size": 4} | options))

        return make

    def test_any_stop_goes_on_with_the_batches_that_were_left(self, make):
        loader = make()
        whole = [first_tokens(loader) for _ in range(3)]
        for stop in range(len(whole[1]) + 1):
            loader = make()
            loader.set_epoch(1)
            iterator = iter(loader)
            taken = [next(iterator).tokens[:, 0].tolist() for _ in range(stop)]
            fresh = make()
            fresh.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            assert taken + first_tokens(fresh) == whole[1]
            assert first_tokens(fresh) == whole[2]

    def test_a_stop_after_a_stop(self, make):
        whole, loader, seen = first_tokens(make()), make(), []
        for _ in range(3):
            seen.append(next(iter(loader)).tokens[:, 0].tolist())
            fresh = make()
            fresh.load_state_dict(loader.state_dict())
            assert fresh.state_dict()["batches_consumed"] == len(seen)
            loader = fresh
        assert seen + first_tokens(loader) == whole

    def test_an_iterator_left_early_does_not_count(self, make):
        loader, whole = make(), first_tokens(make())
        next(iter(loader))
        assert first_tokens(loader) == whole
        assert loader.state_dict()["epoch"] == 1

    def test_the_state_is_small_and_tells_the_set_up(self, make):
        state = make().state_dict()
        assert len(json.dumps(state)) < 300
        assert {"version", "seed", "epoch", "n", "batch_size", "batches_consumed"} <= set(state)

    def test_a_state_of_another_set_up_is_refused(self, make, rows):
        longer = [*rows[:-1], (np.arange(len(rows[-1][0]) + 1), np.ones(len(rows[-1][0]) + 1))]
        others = [make(batch_size=5), make(rows=rows[:-1]), make(rows=longer), make(seed=1)]
        fields = ["batch_size=5", "n=102", "num_tokens", "seed=1"]
        for other, field in zip(others, fields, strict=True):
            with pytest.raises(ResumeError, match=f"saved with {field}"):
                make().load_state_dict(other.state_dict())
        with pytest.raises(ResumeError, match=r"Not a (Bucket|Packed)Batches state"):
            make().load_state_dict({"epoch": 1})
        with pytest.raises(ResumeError, match=r"batches_consumed=-1 in a .* is no position"):
            make().load_state_dict({**make().state_dict(), "batches_consumed": -1})
        with pytest.raises(ResumeError, match=r"batches_consumed=500 .* an epoch has \d+ batches"):
            make().load_state_dict({**make().state_dict(), "batches_consumed": 500})

    def test_without_a_seed_one_is_drawn_and_kept(self, make):
        loader, other = make(seed=None), make(seed=None)
        assert loader.seed != other.seed
        other.load_state_dict(loader.state_dict())
        assert first_tokens(other) == first_tokens(loader)

    def test_seed_0_is_a_seed_and_seeds_do_not_collide_with_epochs(self, make):
        one = make(seed=0)
        one.set_epoch(1)
        assert first_tokens(make(seed=0)) == first_tokens(make(seed=0))
        assert first_tokens(one) != first_tokens(make(seed=1))


@pytest.mark.parametrize(
    ("rows", "options", "error", "text"),
    [
        ([], {}, DataError, "The dataset is empty: 0 rows"),
        (iter([]), {}, ConfigurationError, "dataset is a list_iterator; expected one with __len__"),
        ([7], {}, DataError, r"Row 0 is a int; expected \(tokens, mask\)"),
        ([([1], [1, 0])], {}, DataError, r"tokens of shape \(1,\) and a mask of shape \(2,\)"),
        ([([[1]], [[1]])], {}, DataError, "expected one dimension"),
        ([([0.5], [1])], {}, DataError, "tokens of dtype float64"),
        ([([1], [1])], {"batch_size": 0}, ConfigurationError, "batch_size=0"),
        ([([1], [1])], {"max_shapes": 0}, ConfigurationError, "max_shapes=0"),
        ([([1], [1])], {"shuffle": 1}, ConfigurationError, "shuffle=1"),
        ([([1], [1])], {"seed": -1}, ConfigurationError, "seed=-1"),
    ],
)
def test_arguments_are_checked(rows, options, error, text):
    with pytest.raises(error, match=text):
        BucketBatches(rows, **({"batch_size": 2} | options))


def test_documents_of_one_token_or_none_are_no_trouble():
    batches = list(BucketBatches([([], []), ([1], [1]), ([1, 2], [1, 1])], 1, seed=0))
    assert sum(batch.weights.sum() for batch in batches) == 1
    (batch,) = PackedBatches([([], []), ([1], [1]), ([1, 2], [1, 1])], 2, 4, seed=0)
    assert batch.weights.sum() == 1


@pytest.mark.parametrize("token", [-1, 2**31, 2**32 + 5])
@pytest.mark.parametrize(
    "pack", [lambda rows: BucketBatches(rows, 2), lambda rows: PackedBatches(rows, 2, 4)]
)
def test_token_ids_that_no_model_has_are_refused(pack, token):
    with pytest.raises(DataError, match="Row 1 has token ids from") as caught:
        pack([([1, 2], [1, 1]), ([3, token], [1, 1])])
    assert caught.value.index == 1
