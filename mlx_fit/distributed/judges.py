"""Who tells from signs of life whether all ranks can go on: rank 0 about all, the others about it.

A judge hears messages, learns how much time passed, and comes to at most one verdict. It touches
no socket and no clock. Time counts only while this process itself runs: one that was stopped, or
held up in foreign code, blames nobody for its own pause.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mlx_fit.distributed.verdict import LOST, RAISED, STUCK, Verdict

ABSENT_FACTOR = 10  # a rank that lives but does not come is waited for so many timeouts
BROKEN_SECONDS = 0.5  # a dead rank explains a broken connection, and is noticed within this
SILENT_SECONDS = 1.25  # five heartbeats: whoever is silent so long is not well
LEFT_SECONDS = 2.0  # after a rank left, what it had sent moves on at least this often


@dataclass(frozen=True)
class Limits:
    """Seconds: ``timeout`` for a rank that runs, ``starting`` before its first collective."""

    timeout: float
    starting: float


@dataclass
class Signs:
    """What is known of a rank. ``beat`` is its last heartbeat, ``silence`` seconds since then."""

    silence: float = 0.0
    beat: dict[str, Any] | None = None
    has_left: bool = False

    @property
    def is_inside(self) -> bool:
        """Whether it said that it is in a collective."""
        return not self.has_left and self.beat is not None and bool(self.beat["phase"])

    @property
    def has_begun(self) -> bool:
        """Whether it is known to have been in a collective."""
        return self.beat is not None and self.beat["serial"] > 0

    @property
    def has_met_all(self) -> bool:
        """Whether it ended a collective, so that all ranks have been in one."""
        return self.beat is not None and self.beat["serial"] > 1

    @property
    def step(self) -> int:
        """Where it was last."""
        return self.beat["step"] if self.beat is not None else -1

    @property
    def place(self) -> str:
        """Where it was last, in words."""
        if self.beat is None or not self.has_begun:
            return "before its first collective"
        phase = self.beat["phase"]
        return f"at step {self.step}" + (f" in {phase!r}" if phase else " outside a collective")

    def is_too_silent(self, limits: Limits, has_begun: bool) -> bool:
        """Whether it has given no sign of life for too long."""
        is_running = has_begun or self.has_begun
        longest = limits.timeout if is_running else max(limits.timeout, limits.starting)
        return not self.has_left and self.silence > longest

    def frozen(self, rank: int) -> Verdict:
        """The verdict on a rank that is too silent."""
        cause = f"no sign of life for {self.silence:.1f} s; it was last seen {self.place}"
        return Verdict(LOST, rank, cause, self.step)

    def gone(self, rank: int) -> Verdict:
        """The verdict on a rank whose connection closed."""
        cause = f"its process ended or its network broke; it was last seen {self.place}"
        return Verdict(LOST, rank, cause, self.step)

    def needed(self, rank: int) -> Verdict:
        """The verdict on a rank that left in order while others still need it."""
        cause = f"it had finished, {self.place}, while others were in a collective"
        return Verdict(LOST, rank, cause, self.step)


class Judge(ABC):
    """Comes to a verdict. ``verdict`` is None until then, and never changes after."""

    verdict: Verdict | None

    @abstractmethod
    def heard(self, rank: int, message: dict[str, Any]) -> None:
        """A message of ``rank``; of this rank itself what it says of itself."""

    @abstractmethod
    def closed(self, rank: int) -> None:
        """The connection with ``rank`` ended."""

    @abstractmethod
    def pass_time(self, seconds: float) -> None:
        """So much time has passed."""

    @abstractmethod
    def sign(self, own: dict[str, Any]) -> dict[str, Any]:
        """The heartbeat to send, from this rank's own."""

    @abstractmethod
    def silence(self) -> tuple[float, int]:
        """How long the most silent other rank has been so, and which one it is."""


class JudgeOfAll(Judge):
    """Rank 0's.

    Args:
        size: number of ranks.
        limits: how long to wait.
    """

    def __init__(self, size: int, limits: Limits) -> None:
        self.verdict = None
        self._limits = limits
        self._signs = {rank: Signs() for rank in range(size)}
        self._broken: Verdict | None = None
        self._broken_for = 0.0
        self._left_for = 0.0
        self._still_for = 0.0
        self._places: list[Any] = []

    def heard(self, rank: int, message: dict[str, Any]) -> None:
        signs, kind = self._signs[rank], message["kind"]
        signs.silence = 0.0
        if kind == "beat":
            signs.beat = message
        elif kind == "bye":
            signs.has_left = True
        elif kind == "raised":
            self._decide(
                Verdict(
                    RAISED,
                    rank,
                    str(message["message"]),
                    int(message["step"]),
                    str(message["type"]),
                    exit_code=int(message["code"]),
                )
            )
        elif kind == "broken" and self._broken is None:
            self._broken = Verdict(
                LOST,
                rank,
                f"the connection between ranks {rank} and {message['neighbour']} broke",
                signs.step,
                neighbour=int(message["neighbour"]),
            )

    def closed(self, rank: int) -> None:
        if not self._signs[rank].has_left:
            self._decide(self._signs[rank].gone(rank))

    def pass_time(self, seconds: float) -> None:
        has_begun = any(signs.has_met_all for signs in self._signs.values())
        for rank, signs in self._signs.items():
            if rank:
                signs.silence += seconds
            if signs.is_too_silent(self._limits, has_begun):
                self._decide(signs.frozen(rank))
        if self._broken is not None:
            self._broken_for += seconds
            if self._broken_for > BROKEN_SECONDS:
                left = [rank for rank, signs in self._signs.items() if signs.has_left]
                self._decide(self._signs[left[0]].needed(left[0]) if left else self._broken)
        places = [signs.beat and _moving_part(signs.beat) for signs in self._signs.values()]
        is_still, self._places = places == self._places, places
        self._judge_leavers(seconds, is_still)
        self._judge_stillness(seconds, is_still)

    def sign(self, own: dict[str, Any]) -> dict[str, Any]:
        self.heard(0, own)
        seconds, rank = self.silence()
        return {**own, "silence": seconds, "rank": rank}

    def silence(self) -> tuple[float, int]:
        others = [(s.silence, r) for r, s in self._signs.items() if r and not s.has_left]
        return max(others, default=(0.0, 0))

    def _decide(self, verdict: Verdict) -> None:
        self.verdict = self.verdict or verdict

    def _judge_leavers(self, seconds: float, is_still: bool) -> None:
        """A rank that left in order is missed once others stay in a collective."""
        left = [rank for rank, signs in self._signs.items() if signs.has_left]
        inside = any(signs.is_inside for signs in self._signs.values())
        is_missed = left and inside and is_still
        self._left_for = self._left_for + seconds if is_missed else 0.0
        if self._left_for > min(LEFT_SECONDS, self._limits.timeout):
            self._decide(self._signs[left[0]].needed(left[0]))

    def _judge_stillness(self, seconds: float, is_still: bool) -> None:
        """Ranks in a collective in which nothing moves, or to which a rank does not come."""
        inside = {rank for rank, signs in self._signs.items() if signs.is_inside}
        is_hung = inside and is_still and self.silence()[0] < SILENT_SECONDS
        self._still_for = self._still_for + seconds if is_hung else 0.0
        absent = [rank for rank in self._signs if rank not in inside]
        if self._still_for > self._limits.timeout * (ABSENT_FACTOR if absent else 1):
            what = f"ranks {absent} did not come" if absent else "all ranks are in it, none moves"
            where = "; ".join(f"rank {r} is {s.place}" for r, s in list(self._signs.items())[:8])
            cause = f"nothing happened for {self._still_for:.1f} s and {what}: {where}"
            self._decide(Verdict(STUCK, absent[0] if absent else -1, cause))


class JudgeOfRankZero(Judge):
    """Every other rank's: judges rank 0, and takes over what that decides about the others."""

    def __init__(self, limits: Limits) -> None:
        self.verdict = None
        self._limits = limits
        self._zero = Signs()
        self._own: dict[str, Any] = {"serial": 0, "phase": "", "received": 0}
        self._left_for = 0.0
        self._told = (0.0, 0)

    def heard(self, rank: int, message: dict[str, Any]) -> None:
        self._zero.silence = 0.0
        kind = message["kind"]
        if kind == "beat":
            self._zero.beat = message
            self._told = float(message["silence"]), int(message["rank"])
        elif kind == "bye":
            self._zero.has_left = True
        elif kind == "verdict":
            self.verdict = self.verdict or Verdict.from_message(message)

    def closed(self, rank: int) -> None:
        if not self._zero.has_left:
            self.verdict = self.verdict or self._zero.gone(0)

    def pass_time(self, seconds: float) -> None:
        self._zero.silence += seconds
        if self._zero.is_too_silent(self._limits, has_begun=self._own["serial"] > 1):
            self.verdict = self.verdict or self._zero.frozen(0)
        is_missed = self._zero.has_left and self._own["phase"]
        self._left_for = self._left_for + seconds if is_missed else 0.0
        if self._left_for > min(LEFT_SECONDS, self._limits.timeout):
            self.verdict = self.verdict or self._zero.needed(0)

    def sign(self, own: dict[str, Any]) -> dict[str, Any]:
        if _moving_part(own) != _moving_part(self._own):
            self._left_for = 0.0
        self._own = own
        return own

    def silence(self) -> tuple[float, int]:
        return max((self._zero.silence, 0), self._told)


def _moving_part(beat: dict[str, Any]) -> tuple[Any, ...]:
    return beat["serial"], beat["phase"], beat["received"]
