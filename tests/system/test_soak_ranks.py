"""A few rounds of ``make soak-ranks``: ranks that fail, and the same bits in the end."""

import pytest
import soak_ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, out = soak_ranks.launch(folder, 2, "none", 0, 0)
    assert code == 0, out
    first, second = soak_ranks.result(folder, 2)
    assert first == second
    return first


@pytest.mark.parametrize(("fault", "rank", "step"), [("kill", 1, 13), ("term", 0, 6)])
def test_a_rank_fails_and_the_run_ends_with_the_same_bits(tmp_path, whole, fault, rank, step):
    assert soak_ranks.one_round(tmp_path, 2, fault, rank, step, whole) == ""


def test_the_soak_sees_a_wrong_result_and_a_wrong_exit_code(tmp_path, whole):
    other = {**whole, "weights": "0"}
    wrong = soak_ranks.one_round(tmp_path / "a", 2, "raise", 1, 7, other)
    assert wrong == "other weights or losses than without a fault"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "fault").touch()  # it has happened already, so the run ends well
    assert soak_ranks.one_round(tmp_path / "b", 2, "raise", 1, 7, whole).startswith("exit code 0")
