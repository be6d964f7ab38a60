"""Memory that runs out on one rank of several: all split alike, or all end in a typed error."""

from __future__ import annotations

import pytest
from ranks import HERE, end, run_cases, start

SPLITS = [
    *("split_at_dispatch", "split_shares", "split_late", "split_uneven", "split_foreseen"),
    *("sums_of_windows", "split_resumed"),
]
ENDS = [
    *("full_at_dispatch", "full_at_evaluation", "full_at_update", "full_with_one_row"),
    "full_foreseen",
]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return run_cases(2, SPLITS, tmp_path_factory.mktemp("splits"), "memory_cases.py")


def bits(run):
    return {name: run[name] for name in ("history", "weights", "key")}


@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_all_ranks_have_the_bits_of_a_run_that_began_with_small_batches(splits, accumulation):
    for found in splits["split_at_dispatch"]:
        split, small = found[accumulation]["split"], found[accumulation]["small"]
        assert split["size"] == 2
        assert bits(split) == bits(small)
    assert bits(splits["split_at_dispatch"][0]["1"]["split"]) == bits(
        splits["split_at_dispatch"][1]["1"]["split"]
    )


def test_it_is_said_once_by_rank_0_which_rank_it_is(splits):
    first, second = splits["split_at_dispatch"]
    [text] = first["1"]["split"]["said"]
    assert text.startswith("Memory of rank 1 does not suffice")
    assert "all ranks go on with micro-batches of at most 2 rows" in text
    assert second["1"]["split"]["said"] == []


@pytest.mark.parametrize("strategy", ["data_parallel", "zero1", "parameter_server", "local_sgd"])
def test_every_strategy_goes_on_as_if_no_rank_had_had_room(splits, strategy):
    for found in splits["split_shares"]:
        assert found[strategy]["size"] == 3
        assert bits(found[strategy]) == bits(found[f"{strategy}, begun with it"])


def test_a_window_is_redone_by_all_where_one_fails_in_its_middle(splits):
    for found in splits["split_late"]:
        assert found["middle"]["size"] == found["begin"]["size"] == 4
        assert bits(found["middle"]) == bits(found["begin"])


def test_ranks_without_samples_take_part_in_splitting(splits):
    one, other = splits["split_uneven"]
    assert (one["size"], other["size"], one["step"]) == (2, 2, 6)
    assert bits(one) == bits(other)


def test_what_one_rank_foresees_all_split_by(splits):
    one, other = splits["split_foreseen"]
    assert one["size"] == other["size"] < 2048
    assert bits(one) == bits(other)


def test_agreeing_costs_one_number_an_update_and_nothing_without_splitting(splits):
    for found in splits["sums_of_windows"]:
        for accumulation, updates in ((1, 8), (4, 2)):
            plain, split = found[f"raise {accumulation}"], found[f"split {accumulation}"]
            assert [b - a for a, b in zip(plain, split, strict=True)] == [updates, 4 * updates]


def test_a_run_goes_on_with_the_size_that_was_agreed(splits):
    for found in splits["split_resumed"]:
        assert found["resumed"]["size"] == found["whole"]["size"] == 2
        assert found["resumed"]["weights"] == found["whole"]["weights"]


def test_ranks_of_one_machine_share_its_memory(tmp_path):
    found = run_cases(2, ["shares"], tmp_path, "memory_cases.py")["shares"]
    assert [each["other"]["caught"] for each in found] == [None] * 2  # all of it is enough
    assert found[0]["other"]["share"] is None
    of_one = [each["one"] for each in found]
    expected = (16_000_000 + sum(each["held"] for each in of_one)) // 2
    assert [each["share"] for each in of_one] == [expected] * 2
    for each in of_one:
        text = each["caught"]["text"]
        assert "A training step with 2048 rows on this rank is predicted" in text
        assert "this rank's share of what its machine or container has" in text
        assert "batch_size=2048 with gradient_accumulation=2" in text  # 1024 rows on each


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 2) for name in ENDS), ("full_at_evaluation", 3), ("full_at_update", 3)],
)
def test_all_ranks_end_in_an_error_that_names_the_one_without_memory(name, size, tmp_path):
    found = run_cases(size, [name], tmp_path, "memory_cases.py")[name]
    last = found.pop()
    assert (last["error"], last["kind"]) == (
        "OutOfMemoryError",
        "foreseen" if name == "full_foreseen" else "allocation",
    )
    for other in found:
        assert (other["error"], other["rank"], other["type"]) == (
            "PeerError",
            size - 1,
            "OutOfMemoryError",
        )
        assert last["text"].splitlines()[0] in other["text"]
    assert not list(tmp_path.glob("**/step-*"))


def test_uncaught_it_is_exit_code_1_on_all(tmp_path):
    processes = start(2, [HERE / "memory_cases.py", tmp_path, "full_uncaught"], tmp_path)
    assert end(processes) == [1, 1]
    assert "OutOfMemoryError: The device ran out of memory" in (tmp_path / "rank1.err").read_text()
    assert "PeerError: Rank 1 raised OutOfMemoryError" in (tmp_path / "rank0.err").read_text()
