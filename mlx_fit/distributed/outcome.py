"""What the exit codes of all ranks mean together."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

RESTART, PREEMPTED = 75, 128 + signal.SIGTERM
# A process that ends by this raised in C++, most often because another rank was gone.
_CONSEQUENCE = -signal.SIGABRT


class Ended(Protocol):
    """A rank that has ended; see :class:`~mlx_fit.distributed.processes.RankProcess`."""

    rank: int
    code: int | None
    ended_at: float
    was_told: bool
    is_host_gone: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: the launcher's exit code.
        reason: why, in words; empty if all went well.
        rank: whose fault it was, if one's.
        may_restart: whether starting again can help.
    """

    code: int
    reason: str = ""
    rank: int | None = None
    may_restart: bool = False


def outcome_of(ranks: Sequence[Ended], asked: signal.Signals | None = None) -> Outcome:
    """The outcome of a run whose ranks have all ended.

    A rank that died by a signal, lost its connection or exited with 75 asks for a restart; any
    other failure is the program's own and is not repeated. Of several, what came first counts,
    and before all of them what explains the others.

    Args:
        ranks: all of them.
        asked: the signal that the launcher got, if any.
    """
    bad = sorted((r for r in ranks if r.code != 0), key=lambda r: (r.ended_at, r.rank))
    if not bad:
        return Outcome(0)
    if asked is not None:
        return Outcome(128 + asked, f"ended by {asked.name}")
    own = [r for r in bad if not r.was_told or r.is_host_gone]
    first = [r for r in own if _is_lost(r) or _is_failed(r)]
    first.sort(key=lambda r: r.code == _CONSEQUENCE)
    if first and _is_lost(first[0]):
        rank = first[0]
        return Outcome(RESTART, f"rank {rank.rank} {_death(rank)}", rank.rank, may_restart=True)
    if first:
        code = first[0].code or 1
        return Outcome(code, f"rank {first[0].rank} ended with exit code {code}", first[0].rank)
    for code, reason in ((PREEMPTED, "was preempted"), (RESTART, "asks to be started again")):
        if found := [r for r in own if _code(r) == code]:
            text = f"rank {found[0].rank} {reason} (exit code {code})"
            return Outcome(code, text, found[0].rank, may_restart=code == RESTART)
    return Outcome(1, f"rank {bad[0].rank} had to be ended", bad[0].rank)


def _is_lost(rank: Ended) -> bool:
    return rank.is_host_gone or (rank.code is not None and rank.code < 0 and not _is_stopped(rank))


def _is_failed(rank: Ended) -> bool:
    return not _is_lost(rank) and rank.code not in (0, RESTART, PREEMPTED) and not _is_stopped(rank)


def _is_stopped(rank: Ended) -> bool:
    """A rank without a handler that somebody sent SIGTERM was preempted as well."""
    return rank.code == -signal.SIGTERM


def _death(rank: Ended) -> str:
    if rank.is_host_gone:
        return "could not be reached any more"
    try:
        return f"was ended by {signal.Signals(-(rank.code or 0)).name}"
    except ValueError:
        return f"was ended by signal {-(rank.code or 0)}"


def _code(rank: Ended) -> int | None:
    return PREEMPTED if _is_stopped(rank) else rank.code
