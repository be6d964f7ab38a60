"""What silence, stillness and last words mean, without a socket or a clock."""

import pytest

from mlx_fit.distributed.judges import JudgeOfAll, JudgeOfRankZero, Limits
from mlx_fit.distributed.verdict import Verdict
from mlx_fit.errors import CollectiveTimeoutError, PeerError, PeerLostError

LIMITS = Limits(timeout=2.0, starting=10.0)


def beat(serial=5, step=3, phase="gradients", received=0):
    return {
        "kind": "beat",
        "serial": serial,
        "step": step,
        "phase": phase,
        "received": received,
        "silence": 0.0,
        "rank": 1,
    }


def run(judge, seconds, *beats):
    """Let time pass, with a heartbeat of each rank (None: silent) every quarter of a second."""
    for _ in range(round(seconds / 0.25)):
        for rank, sign in enumerate(beats):
            if sign is not None:
                judge.heard(rank, sign() if callable(sign) else sign)
        judge.pass_time(0.25)
    return judge.verdict


def test_a_silent_rank_is_lost_after_the_timeout():
    judge = JudgeOfAll(3, LIMITS)
    assert run(judge, 5, beat(), beat(phase=""), beat(phase="")) is None
    assert run(judge, 1.75, beat(), beat(), None) is None
    verdict = run(judge, 0.5, beat(), beat(), None)
    assert (verdict.what, verdict.rank, verdict.step) == ("lost", 2, 3)
    assert "no sign of life for 2.2 s; it was last seen at step 3" in verdict.cause


def test_before_the_first_collective_a_rank_may_be_silent_for_init_timeout():
    judge = JudgeOfAll(2, LIMITS)
    start = beat(serial=0, phase="")
    assert run(judge, 9.5, start, None) is None
    assert run(judge, 1, start, None).rank == 1


def test_after_a_collective_that_ended_no_rank_is_starting():
    assert run(JudgeOfAll(2, LIMITS), 2.5, beat(serial=2), None).rank == 1


def test_a_rank_that_lives_and_does_not_come_is_waited_for_ten_timeouts():
    judge = JudgeOfAll(2, LIMITS)
    assert run(judge, 20, beat(), beat(serial=4, phase="")) is None
    verdict = run(judge, 0.75, beat(), beat(serial=4, phase=""))
    assert (verdict.what, verdict.rank) == ("stuck", 1)
    assert "ranks [1] did not come" in verdict.cause


def test_a_collective_that_all_are_in_is_stuck_after_the_timeout_unless_bytes_move():
    judge, bytes_in = JudgeOfAll(2, LIMITS), iter(range(10_000))
    assert run(judge, 20, beat(), lambda: beat(received=next(bytes_in))) is None
    verdict = run(judge, 2.75, beat(), beat())
    assert (verdict.what, verdict.rank) == ("stuck", -1)


def test_collectives_that_end_are_never_stuck():
    judge, serials = JudgeOfAll(2, LIMITS), iter(range(10_000))
    assert run(judge, 30, beat(), lambda: beat(serial=next(serials))) is None


def test_a_closed_connection_is_a_loss_at_once_and_not_after_goodbye():
    judge = JudgeOfAll(3, LIMITS)
    judge.heard(1, {"kind": "bye"})
    judge.closed(1)
    assert judge.verdict is None
    judge.closed(2)
    assert (judge.verdict.what, judge.verdict.rank) == ("lost", 2)


def test_a_rank_that_left_in_order_is_missed_once_others_need_it():
    judge = JudgeOfAll(2, LIMITS)
    run(judge, 1, beat(phase=""), beat(phase=""))
    judge.heard(1, {"kind": "bye"})
    assert run(judge, 10, beat(phase="")) is None
    assert "finished" in run(judge, 3, beat()).cause


def test_a_broken_link_is_explained_by_a_dead_rank_if_there_is_one():
    broken = {"kind": "broken", "neighbour": 1}
    judge = JudgeOfAll(3, LIMITS)
    judge.heard(2, broken)
    judge.closed(1)
    assert "process ended" in judge.verdict.cause
    judge = JudgeOfAll(3, LIMITS)
    judge.heard(2, broken)
    assert judge.verdict is None
    verdict = run(judge, 0.75, beat(), beat(), beat())
    assert "between ranks 2 and 1 broke" in verdict.cause
    assert [verdict.error(rank, 4, "").rank for rank in range(3)] == [2, 2, 1]


def test_the_first_verdict_stays():
    judge = JudgeOfAll(3, LIMITS)
    raised = {"kind": "raised", "type": "KeyError", "message": "'x'", "step": 7, "code": 1}
    judge.heard(2, raised)
    judge.closed(1)
    assert (judge.verdict.rank, judge.verdict.type, judge.verdict.step) == (2, "KeyError", 7)


def test_others_judge_rank_0_and_believe_it_about_the_rest():
    judge = JudgeOfRankZero(LIMITS)
    assert run(judge, 5, beat()) is None
    assert run(judge, 2.5, None).rank == 0
    judge = JudgeOfRankZero(LIMITS)
    judge.heard(0, Verdict("lost", 3, "gone").as_message())
    judge.closed(0)
    assert judge.verdict == Verdict("lost", 3, "gone")
    judge = JudgeOfRankZero(LIMITS)
    judge.closed(0)
    assert judge.verdict.rank == 0


def test_rank_0_that_left_in_order_is_missed_in_a_collective_that_does_not_move():
    judge, bytes_in = JudgeOfRankZero(LIMITS), iter(range(10_000))
    judge.heard(0, {"kind": "bye"})
    judge.closed(0)
    for moving in (lambda: beat(received=next(bytes_in)), lambda: beat(phase="")):
        for _ in range(40):
            judge.sign(moving())
            judge.pass_time(0.25)
        assert judge.verdict is None
    for _ in range(10):
        judge.sign(beat())
        judge.pass_time(0.25)
    assert "finished" in judge.verdict.cause


@pytest.mark.parametrize(
    ("verdict", "kind", "facts"),
    [
        (Verdict("lost", 2, "gone", 7), PeerLostError, {"rank": 2, "step": 4, "exit_code": 75}),
        (
            Verdict("raised", 2, "boom", 3, "ValueError"),
            PeerError,
            {"rank": 2, "step": 3, "type": "ValueError", "message": "boom", "exit_code": 1},
        ),
        (Verdict("stuck", -1, "x"), CollectiveTimeoutError, {"step": 4, "phase": "save"}),
    ],
    ids=lambda value: getattr(value, "what", ""),
)
def test_a_verdict_becomes_its_error(verdict, kind, facts):
    error = Verdict.from_message(verdict.as_message()).error(0, 4, "save")
    assert type(error) is kind
    assert {name: getattr(error, name) for name in facts} == facts


def test_an_exception_without_a_text_is_told_as_a_sentence():
    verdict = Verdict("raised", 1, "", step=2, type="KeyboardInterrupt")
    assert str(verdict.error(0, 3, "header")).startswith(
        "Rank 1 raised KeyboardInterrupt at step 2.\n"
    )
