"""The thread that sends heartbeats, listens to the other ranks, and ends what can never end."""

from __future__ import annotations

import selectors
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from mlx_fit.distributed.frames import Connection, Garbage, Message
from mlx_fit.distributed.judges import SILENT_SECONDS, Judge
from mlx_fit.distributed.leaving import RESTART_CODE, SignalTap, leave
from mlx_fit.distributed.ring_sockets import RingSockets
from mlx_fit.distributed.verdict import Verdict

BEAT_SECONDS = 0.25
CUT_SECONDS = 3.0  # a collective that was cut ends within this, or the process does
SIGNAL_CUT_SECONDS = 0.5  # the same after a signal: who sent it does not wait long
_SAY_SECONDS = 1.0

ring_was_cut = threading.Event()  # MLX cannot connect a second time in a process


@dataclass(frozen=True)
class Place:
    """Where the main thread is: ``serial`` counts collectives; ``phase`` is empty outside one."""

    serial: int = 0
    step: int = -1
    phase: str = ""


class Monitor:
    """Heartbeats and verdicts of one rank, in a daemon thread.

    The main thread writes ``place`` and reads ``verdict`` and ``signal``.

    Args:
        rank: this one.
        judge: comes to verdicts.
        connections: by rank; rank 0 has one with each other rank, the others one with rank 0.
        ring: MLX's sockets.
    """

    def __init__(
        self, rank: int, judge: Judge, connections: dict[int, Connection], ring: RingSockets
    ) -> None:
        self.place = Place()
        self.verdict: Verdict | None = None
        self.signal: int | None = None  # that ended the collective
        self.decided = threading.Event()  # there is a verdict, or a signal that ends it
        self._rank = rank
        self._judge = judge
        self._connections = connections
        self._ring = ring
        self._outbox: list[Message] = []
        self._is_said = threading.Event()
        self._is_closing = False
        self._is_hurried = False
        self._signals: list[int] = []
        self._leave_at: tuple[float, int] | None = None  # when, and from which collective
        self._tap = SignalTap()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for connection in connections.values():
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)
        for reader in (self._wake, self._tap.reader):
            self._selector.register(reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="mlx_fit control", daemon=True)
        self._thread.start()

    def say(self, message: Message) -> None:
        """Tell rank 0, or on rank 0 the judge; returns when it is sent, or after a second."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return
        self._is_said.clear()
        self._outbox.append(message)
        self._waker.send(b"x")
        self._is_said.wait(_SAY_SECONDS)

    def beat_now(self) -> None:
        """Tell at once where this rank is."""
        self._is_hurried = True
        self._waker.send(b"x")

    def close(self) -> None:
        """Say goodbye and end the thread."""
        self.say({"kind": "bye"})
        self._is_closing = True
        self._waker.send(b"x")
        self._thread.join(_SAY_SECONDS)
        if self._thread.is_alive():
            return
        self._tap.close()
        self._selector.close()
        self._wake.close()
        self._waker.close()
        for connection in self._connections.values():
            connection.close()

    def broken_neighbour(self) -> int:
        """The rank behind a broken connection of the ring, or -1."""
        neighbour = self._ring.broken_neighbour()
        return -1 if neighbour is None else neighbour

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        last = next_beat = time.monotonic()
        while not self._is_closing:
            for key, _ in self._selector.select(max(0.0, min(next_beat - last, BEAT_SECONDS))):
                self._read(key)
            now = time.monotonic()
            # What is longer than the wait was a pause of this process, and nobody's silence.
            self._judge.pass_time(min(now - last, 2 * BEAT_SECONDS))
            last = now
            self._send_outbox()
            if now >= next_beat or self._is_hurried:
                self._is_hurried = False
                next_beat = now + BEAT_SECONDS
                self._beat()
            self._apply(now)

    def _read(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._wake:
            self._wake.recv(64)
        elif key.fileobj is self._tap.reader:
            self._signals += self._tap.read()
        else:
            self._read_from(key.data)

    def _read_from(self, connection: Connection) -> None:
        rank = next(r for r, other in self._connections.items() if other is connection)
        try:
            for message in connection.receive():
                self._judge.heard(rank, message)
        except (EOFError, Garbage, KeyError, TypeError, ValueError):
            self._selector.unregister(connection.sock)
            del self._connections[rank]
            connection.close()
            self._judge.closed(rank)

    def _beat(self) -> None:
        place = self.place
        own: dict[str, Any] = {
            "kind": "beat",
            "serial": place.serial,
            "step": place.step,
            "phase": place.phase,
            "received": self._ring.num_received() if place.phase else 0,
        }
        sign = self._judge.sign(own)
        for connection in self._connections.values():
            connection.flush()
            if not connection.is_behind:  # a frozen rank reads none of them
                connection.send(sign)

    def _send_outbox(self) -> None:
        """What this rank says goes to rank 0; on rank 0 the judge hears it, goodbyes all ranks."""
        while self._outbox:
            message = self._outbox.pop(0)
            if self._rank == 0:
                self._judge.heard(0, message)
            if self._rank or message["kind"] == "bye":
                self._send(message)
            else:
                self._announce()
            if not self._outbox:
                self._is_said.set()

    def _send(self, message: Message) -> None:
        for connection in self._connections.values():
            connection.send(message)

    def _announce(self) -> None:
        """Make a new verdict known: to the other ranks, and to the main thread."""
        verdict = self._judge.verdict
        if verdict is None or self.verdict is not None:
            return
        self.verdict = verdict
        if self._rank == 0:
            self._send(verdict.as_message())
        self.decided.set()
        self._cut(CUT_SECONDS)

    def _apply(self, now: float) -> None:
        self._announce()
        for connection in self._connections.values():
            connection.flush()
        self._heed_signals()
        if self._leave_at is None or now < self._leave_at[0]:
            return
        if self.place.phase and self.place.serial == self._leave_at[1]:
            self._leave()
        self._leave_at = None

    def _cut(self, seconds: float) -> None:
        """End the collective that the main thread may be in, one way or the other."""
        place = self.place
        if self._ring.cut():
            ring_was_cut.set()
        if place.phase:
            self._leave_at = time.monotonic() + seconds, place.serial

    def _heed_signals(self) -> None:
        """A signal ends a collective that waits for a rank that is not well, or when repeated.

        Otherwise the collective ends soon by itself, and the run stops in order.
        """
        if not self._signals or self.signal is not None or not self.place.phase:
            return
        asked = [n for n in self._signals if n in (signal.SIGTERM, signal.SIGINT)]
        is_unwell = self._judge.silence()[0] > SILENT_SECONDS or self.verdict is not None
        if asked and (is_unwell or len(asked) > 1):
            self.signal = asked[-1]
            self.decided.set()
            self._cut(SIGNAL_CUT_SECONDS)

    def _leave(self) -> None:
        place, verdict = self.place, self.verdict
        if self.signal is not None:
            code, reason = 128 + self.signal, f"{signal.Signals(self.signal).name} came."
        else:
            assert verdict is not None
            error = verdict.error(self._rank, place.step, place.phase)
            code, reason = RESTART_CODE, f"{error} The collective could not be ended."
        if self._rank:
            message = {"type": "SystemExit", "message": reason, "step": place.step, "code": code}
            self._send({"kind": "raised", **message})
        leave(code, f"rank {self._rank}: {reason}")
