"""Ranks that have no data of their own take part with nothing."""

from __future__ import annotations

import numpy as np
import pytest
import rank_cases
from rank_cases import fitted, rows, trainer_of
from ranks import run_cases

CASES = [
    *("trained_by_rank_0", "trained_by_rank_1", "epochs_of_steps_of_rank_1"),
    *("validated_by_rank_0", "evaluated_by_rank_1", "several_sets", "single_batches"),
    *("nothing_anywhere", "other_kinds", "resumed", "epochs_of_steps_of_iterators"),
]
FORMS = ("list", "iterator", "function")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_cases(2, CASES, tmp_path_factory.mktemp("uneven"), "uneven_cases.py")


def batches(count):
    """What the one rank with data has: batches of 4 rows."""
    x, y = rows(4 * count)
    return [(x[i : i + 4], y[i : i + 4]) for i in range(0, 4 * count, 4)]


def assert_same(found, expected, *keys):
    for key in keys:
        for name, values in expected[key].items():
            np.testing.assert_allclose(found[key][name], values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_training_with_an_idle_rank_is_that_of_one_process(two, form):
    trainer = trainer_of(optimizer=rank_cases.optim.AdamW(0.01))
    expected = fitted(trainer, batches(5), epochs=1 if form == "iterator" else 2)
    for found in two["trained_by_rank_0"]:
        assert_same(found[form], expected, "weights", "history")


def test_the_rank_that_writes_may_be_the_idle_one(two):
    trainer = trainer_of(gradient_accumulation=2, clip_norm=0.5)
    expected = fitted(trainer, batches(5), epochs=2)
    for found in two["trained_by_rank_1"]:
        assert_same(found, expected, "weights", "history")
        assert (found["step"], found["updates"]) == (6, 6)


@pytest.mark.parametrize("form", FORMS)
def test_epochs_of_steps_go_on_without_the_idle_rank(two, form):
    options = {"epochs": 1, "steps_per_epoch": 3} if form == "iterator" else {"epochs": 2}
    expected = fitted(trainer_of(), batches(3), **{"steps_per_epoch": 4} | options)
    for found in two["epochs_of_steps_of_rank_1"]:
        assert_same(found[form], expected, "weights", "history")


def test_an_iterator_that_has_run_out_takes_part_until_all_have(two):
    x, y = rows(20)
    own = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    # The first batch of both ranks together, then rank 0's alone.
    joined = [tuple(map(np.concatenate, zip(own[0], own[4], strict=True))), *own[1:4]]
    expected = fitted(trainer_of(), joined, epochs=2, steps_per_epoch=2)
    for found in two["epochs_of_steps_of_iterators"]:
        assert_same(found, expected, "weights", "history")
        assert found["error"]["type"] == "DataError"
        assert "ran out after 0 of 2 steps" in found["error"]["text"]


@pytest.mark.parametrize("form", FORMS)
def test_validation_counts_what_there_is(two, form):
    first, second = two["validated_by_rank_0"]
    assert first == second
    assert first[form] == first["list"]
    assert len(first[form]["val_loss"]) == 2


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_and_prediction_need_one_rank_with_rows(two, form):
    expected = trainer_of(metrics=("accuracy", "auroc")).evaluate(batches(3), verbose=0)
    outputs = trainer_of().predict(batches(3), verbose=0)
    for found in two["evaluated_by_rank_1"]:
        assert found[form]["values"] == pytest.approx(expected, abs=1e-6)
        assert np.array(found[form]["outputs"]) == pytest.approx(outputs, abs=1e-6)


def test_each_rank_may_have_another_of_several_validation_sets(two):
    first, second = two["several_sets"]
    assert first == second
    assert {"val_a_loss", "val_b_loss"} < first[0].keys()
    assert "val_loss" in first[1]


def test_single_batches_are_the_same_news_for_all(two):
    trainer, (x, y) = trainer_of(), rows(6)
    expected = [trainer.train_on_batch(x, y), trainer.train_on_batch(x, y)]
    expected.append(trainer.test_on_batch(x, y))
    for found in two["single_batches"]:
        assert found == [pytest.approx(each, abs=1e-6) for each in expected]


@pytest.mark.parametrize("form", [*FORMS, "arrays"])
def test_nothing_on_all_ranks_is_the_same_error_on_each(two, form):
    first, second = two["nothing_anywhere"]
    assert first[form] == second[form]
    for error, name in zip(first[form], ("train", "train", "val", "data", "data"), strict=True):
        assert error["type"] == "DataError"
        assert error["text"] == f"{name} is empty on all 2 ranks: not a single row or batch."


def test_after_that_the_ranks_can_go_on(two):
    assert two["nothing_anywhere"][0]["after"] == two["nothing_anywhere"][1]["after"]


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("array", "ConfigurationError", "The number of rows of train is 0 on rank 0 and 24 on"),
        ("loader", "ConfigurationError", "The number of rows of train is 24 on rank 0 and 0 on"),
        ("mixed", "ConfigurationError", "on rank 0, and batches of its own on rank 1"),
        ("val", "ConfigurationError", "fit's val is 'one set' on rank 0 and 'nothing' on rank 1"),
        ("stop", "DataError", "uneven='stop'"),
        ("stop late", "DataError", "uneven='stop'"),
    ],
)
def test_what_cannot_be_meant_is_one_error_for_all(two, name, kind, text):
    first, second = (found[name] for found in two["other_kinds"])
    assert first == second
    assert first["type"] == kind
    assert text in first["text"]


@pytest.mark.parametrize("name", ["list 4", "list 9", "function 4", "function 9"])
def test_a_run_of_uneven_ranks_goes_on_where_each_was(two, name):
    for found in two["resumed"]:
        whole, parts = found[name]
        assert whole == parts
        assert whole["step"] == 12


def test_a_share_of_one_row_through_batch_norm_says_what_to_change(tmp_path):
    name = "one_row_through_batch_norm"
    first, second = run_cases(2, [name], tmp_path, "uneven_cases.py")[name]
    assert (first["type"], second["type"]) == ("PeerError", "DataError")
    text = "rank 1's share of the batch is one row. Each rank normalises its own share: give batch"
    assert text in second["text"]
    assert f"Rank 1 raised DataError at step 1: {second['text']}" in first["text"]
