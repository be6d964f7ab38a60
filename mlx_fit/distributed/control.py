"""The control plane: ranks agree before they start, and none waits for ever for another.

MLX's collectives have no timeout: a rank that dies, freezes or raises leaves the others waiting.
Beside them, every rank keeps a small TCP connection with rank 0 and sends a heartbeat four times a
second that says where it is. Rank 0 decides what a silence means and tells all; a blocked
collective is then ended by shutting the ring's own sockets.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlx_fit.checks import natural, number
from mlx_fit.distributed.environment import (
    Address,
    control_address,
    control_token,
    ring_addresses,
)
from mlx_fit.distributed.frames import Connection
from mlx_fit.distributed.judges import Judge, JudgeOfAll, JudgeOfRankZero, Limits
from mlx_fit.distributed.leaving import enter, forget, set_exit_codes
from mlx_fit.distributed.monitor import Monitor, Place, ring_was_cut
from mlx_fit.distributed.plans import canonical
from mlx_fit.distributed.rendezvous import Meeting, host, visit
from mlx_fit.distributed.ring_sockets import RingSockets
from mlx_fit.distributed.verdict import LOST, Verdict
from mlx_fit.errors import ConfigurationError, DistributedError, Preempted

_TEXT_LENGTH = 4000  # of a peer's message
_VERDICT_SECONDS = 3.0
# What a collective raises when its connection breaks, apart from what was asked wrongly.
_CONNECTION_ERROR = re.compile(
    r"\[ring\] connection to a peer was lost|\[\w+\] (?:Send|Recv) failed"
)


class ControlPlane:
    """What the ranks of a run say to each other beside their collectives.

    Args:
        rank: this process's, 0-based.
        size: number of ranks. A group of one opens no socket and watches nothing.
        timeout: seconds without a sign of life after which a rank counts as lost, and without
            progress after which a collective that all ranks are in counts as stuck. A rank that
            lives but does not come is waited for ten times as long. At least 1: a heartbeat comes
            every quarter of a second.
        init_timeout: seconds that ranks may be apart when they start.
        address: rank 0's ``"host:port"``, the same on all ranks. Default: what ``mlx-fit launch``
            sets, else one beside the address of rank 0 that MLX's own environment names.

    Raises:
        ConfigurationError: an argument cannot work, or nothing tells where rank 0 is.

    Example:
        >>> control = ControlPlane(rank=0, size=1)
        >>> control.join({"parameters": {"weight": ["float32", [8, 4]]}})
        >>> with control.watching(step=0, phase="gradients"):
        ...     pass  # evaluate a collective
        >>> control.close()
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float = 60.0,
        init_timeout: float = 60.0,
        address: str | None = None,
    ) -> None:
        self._size = natural("size", size, least=1)
        self._rank = natural("rank", rank)
        if self._rank >= self._size:
            raise ConfigurationError(f"rank={rank} with size={size}; expected less than size.")
        self._timeout = number("timeout", timeout, least=1.0)
        self._init_timeout = number("init_timeout", init_timeout, least=0.1)
        self._address = None if address is None else Address.parse(address)
        if self._size > 1 and self._address is None:
            self._address = control_address(os.environ)
        # Read now: the host file may be gone when the sockets are needed.
        self._ring = RingSockets(ring_addresses(os.environ) if self._size > 1 else [], self._rank)
        self._token = control_token(os.environ) if self._size > 1 else ""
        self._monitor: Monitor | None = None

    def join(self, plan: Mapping[str, Any]) -> None:
        """Meet the other ranks and make sure that all are about to do the same.

        To be called before ``mlx.core.distributed.init``, which waits without a timeout and keeps
        every thread of Python from running meanwhile. Called again, it exchanges a new plan.

        Args:
            plan: names, shapes, dtypes, buckets, seed and whatever else must be equal, in the order
                in which differences should be named; values that JSON lacks count by their ``str``.

        Raises:
            RendezvousError: ranks did not come within ``init_timeout``; ``missing`` names them.
            PlanMismatchError: ``first`` names the first entry that differs. On all ranks.
        """
        if not isinstance(plan, Mapping):
            raise ConfigurationError(f"plan={plan!r}; expected a mapping of names to values.")
        self.close()
        if self._address is None:
            return
        if ring_was_cut.is_set():
            raise DistributedError(
                "A collective failed in this process before, and MLX connects its ranks only once "
                "in a process. Start all ranks again from the last checkpoint."
            )
        ours = canonical(plan)
        set_exit_codes()
        meeting = Meeting(self._address, self._size, self._token, self._init_timeout)
        limits = Limits(self._timeout, self._init_timeout)
        connections: dict[int, Connection]
        judge: Judge
        if self._rank == 0:
            connections, judge = host(meeting, ours), JudgeOfAll(self._size, limits)
        else:
            connections, judge = {0: visit(meeting, self._rank, ours)}, JudgeOfRankZero(limits)
        self._monitor = Monitor(self._rank, judge, connections, self._ring)
        enter(self)

    @contextmanager
    def watching(self, step: int, phase: str) -> Iterator[None]:
        """Watch over one collective; what it needs should be evaluated before.

        Args:
            step: the update that it belongs to.
            phase: what it is for, as ``"gradients"``; all ranks say the same.

        Raises:
            PeerLostError: a rank ended, froze, or its network broke.
            PeerError: a rank raised; its exception is named.
            CollectiveTimeoutError: the collective does not end.
            Preempted: SIGTERM came while it waited for a rank that is not well.
        """
        monitor = self._monitor
        if monitor is None:
            yield
            return
        if monitor.verdict is not None:  # after an error no collective is begun
            raise monitor.verdict.error(self._rank, step, phase)
        serial = monitor.place.serial + 1
        monitor.place = Place(serial, step, phase)
        if serial == 1:
            monitor.beat_now()  # from now on the shorter timeout counts for this rank
        try:
            # The verdict may have come in between, and its cut before the ring was there.
            if monitor.verdict is not None:
                raise monitor.verdict.error(self._rank, step, phase)
            yield
        except RuntimeError as error:
            if (because := self._explained(monitor, error, step, phase)) is None:
                raise
            raise because from error
        finally:
            monitor.place = Place(serial, step)

    def report(self, error: BaseException, step: int | None = None) -> None:
        """Tell the other ranks that this one leaves, and why; they raise ``PeerError``.

        Args:
            error: what was raised here. What only follows from another rank's end is not told.
            step: the update at which it was; default the last one that was watched.
        """
        monitor = self._monitor
        if monitor is None or (isinstance(error, DistributedError) and monitor.verdict is not None):
            return
        monitor.say(
            {
                "kind": "raised",
                "type": type(error).__name__,
                "message": str(error)[:_TEXT_LENGTH],
                "step": monitor.place.step if step is None else int(step),
                "code": _exit_code(error),
            }
        )

    def close(self) -> None:
        """Leave in order. Ranks that still need this one in a collective take it for lost."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            forget(self)
            monitor.close()

    def _explained(
        self, monitor: Monitor, error: RuntimeError, step: int, phase: str
    ) -> BaseException | None:
        """What ``error`` of MLX follows from; None if it is something of its own."""
        is_broken = type(error) is RuntimeError and _CONNECTION_ERROR.match(str(error))
        if not is_broken:
            return None
        if not monitor.decided.is_set():
            neighbour = monitor.broken_neighbour()
            monitor.say({"kind": "broken", "neighbour": neighbour})
            monitor.decided.wait(_VERDICT_SECONDS)
        else:
            neighbour = -1
        if monitor.signal == signal.SIGTERM:
            return Preempted(f"stopped by SIGTERM in a collective at step {step}", step=step)
        if monitor.signal is not None:
            return KeyboardInterrupt()
        verdict = monitor.verdict or Verdict(LOST, self._rank, str(error), neighbour=neighbour)
        return verdict.error(self._rank, step, phase)


def _exit_code(error: BaseException) -> int:
    """What the other ranks should exit with because of ``error``: a user's mistake is none of
    theirs, and their own code says whether to start again."""
    if isinstance(error, Preempted):
        return error.code
    return error.exit_code if isinstance(error, DistributedError) else 1
