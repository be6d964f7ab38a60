"""Why the ranks cannot go on together, as it is told to all of them, and the error it becomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_fit.errors import CollectiveTimeoutError, DistributedError, PeerError, PeerLostError

LOST, RAISED, STUCK = "lost", "raised", "stuck"
_AGAIN = (
    "Collectives are no longer possible in this process: start all ranks again from the last "
    "checkpoint."
)


@dataclass(frozen=True)
class Verdict:
    """What happened.

    Attributes:
        what: ``"lost"``, ``"raised"`` or ``"stuck"``.
        rank: whom it happened to; for ``"stuck"`` a rank that is waited for, or -1.
        cause: in words; of ``"raised"`` the exception's message.
        step: where that rank was, 0-based as it counts itself; -1 if unknown.
        type: class name of the exception, for ``"raised"``.
        neighbour: whom a broken connection led to, or -1.
        exit_code: what that rank exits with, for ``"raised"``.
    """

    what: str
    rank: int
    cause: str
    step: int = -1
    type: str = ""
    neighbour: int = -1
    exit_code: int = 1

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Verdict:
        """Read what :meth:`as_message` wrote."""
        return cls(**{field.name: message[field.name] for field in fields(cls)})

    def as_message(self) -> dict[str, Any]:
        """For the other ranks."""
        return {"kind": "verdict", **asdict(self)}

    def error(self, rank: int, step: int, phase: str) -> DistributedError:
        """The error to raise on ``rank``, which was at ``step`` in ``phase``."""
        where = f"at step {step} ({phase})" if phase else f"at step {step}"
        if self.what == RAISED:
            said = f": {self.cause}" if self.cause else "."  # Ctrl-C has no text
            return PeerError(
                f"Rank {self.rank} raised {self.type} at step {self.step}{said}\n"
                f"This rank, {rank}, was {where}. The traceback is in rank {self.rank}'s output.",
                rank=self.rank,
                step=self.step,
                type=self.type,
                message=self.cause,
                exit_code=self.exit_code,
            )
        if self.what == STUCK:
            return CollectiveTimeoutError(
                f"A collective did not end {where}: {self.cause}. {_AGAIN}",
                step=step,
                phase=phase,
            )
        lost = self.neighbour if self.rank == rank and self.neighbour >= 0 else self.rank
        return PeerLostError(
            f"Rank {lost} was lost {where}: {self.cause}. {_AGAIN}",
            rank=lost,
            step=step,
            cause=self.cause,
        )
