"""All ranks meet at rank 0 before MLX connects them, and agree on what they are about to do.

``mlx.core.distributed.init`` waits for ever for a rank that does not come, and the ring adds up
arrays of different sizes without an error. So ranks meet here first, with a timeout: rank 0
listens, the others come with a hash of their plan. Whoever does not know the token of the run is
ignored.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import selectors
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_fit.distributed.environment import CONTROL, Address
from mlx_fit.distributed.frames import MESSAGE_BYTES, Connection, Garbage, Message
from mlx_fit.distributed.plans import digest, first_difference
from mlx_fit.errors import PlanMismatchError, RendezvousError

PROTOCOL = 1
HELLO_SECONDS = 5.0  # how long one may be silent after connecting
NEWS_SECONDS = 0.25
MAX_STRANGERS = 64
_STEP = 0.05


@dataclass(frozen=True)
class Meeting:
    """What all ranks know about where and how they meet."""

    address: Address
    size: int
    token: str
    timeout: float


def missing_ranks(missing: Iterable[int], meeting: Meeting, note: str = "") -> RendezvousError:
    """The error that names the ranks that did not come."""
    ranks = sorted(missing)
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return RendezvousError(
        f"{named} of {meeting.size} did not arrive at {meeting.address} within "
        f"{meeting.timeout:g} s.{note} See what became of them, or raise init_timeout.",
        missing=ranks,
    )


def plan_mismatch(first: str, ranks: list[int], values: list[str]) -> PlanMismatchError:
    """The error that names the first difference."""
    return PlanMismatchError(
        f"The ranks are about to do different things; first difference: {first} is {values[0]} on "
        f"rank {ranks[0]} and {values[1]} on rank {ranks[1]}. Start the same program with the same "
        "arguments, model and data on all ranks.",
        first=first,
        ranks=ranks,
        values=values,
    )


# --- rank 0 ---------------------------------------------------------------------------------------


def host(meeting: Meeting, plan: Any) -> dict[int, Connection]:
    """Wait for all other ranks; their connections by rank. For rank 0.

    Raises:
        RendezvousError: some did not come in time, or the address cannot be used.
        PlanMismatchError: a rank's plan differs.
    """
    deadline = time.monotonic() + meeting.timeout
    with _listen(meeting, deadline) as listener:
        desk = _Desk(meeting, plan, listener)
        try:
            while desk.missing and time.monotonic() < deadline:
                desk.serve()
            if desk.missing:
                missing = sorted(desk.missing)
                desk.tell_all({"kind": "missing", "ranks": missing})
                raise missing_ranks(missing, meeting)
            desk.compare(time.monotonic() + HELLO_SECONDS)
            desk.tell_all({"kind": "go"})
            return desk.release()
        finally:
            desk.close()


class _Desk:
    """Where ranks sign in: accepts connections and keeps those of the run's ranks."""

    def __init__(self, meeting: Meeting, plan: Any, listener: socket.socket) -> None:
        self._meeting = meeting
        self._plan = plan
        self._listener = listener
        self._strangers: dict[Connection, float] = {}  # until when each may be silent
        self._ranks: dict[int, Connection] = {}
        self._digests: dict[int, str] = {}
        self._plans: dict[int, Any] = {}
        self._next_news = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    @property
    def missing(self) -> set[int]:
        return set(range(1, self._meeting.size)) - set(self._ranks)

    def serve(self) -> None:
        """Handle what has come within a moment."""
        for key, _ in self._selector.select(_STEP):
            if key.data is None:
                self._accept()
            else:
                self._read(key.data)
        now = time.monotonic()
        for stranger in [one for one, until in self._strangers.items() if until < now]:
            self._drop(stranger)
        if now >= self._next_news:
            self._next_news = now + NEWS_SECONDS
            for connection in self._ranks.values():
                connection.send({"kind": "waiting", "ranks": sorted(self.missing)})

    def compare(self, deadline: float) -> None:
        """Raise, here and on all ranks, for the lowest rank whose plan differs."""
        ours = digest(self._plan)
        for rank in sorted(self._ranks):
            if self._digests[rank] == ours:
                continue
            self._ranks[rank].limit = MESSAGE_BYTES
            self._ranks[rank].send({"kind": "plan?"})
            while rank in self._ranks and rank not in self._plans and time.monotonic() < deadline:
                self.serve()
            if rank not in self._plans:
                raise missing_ranks([rank], self._meeting, " It left before its plan was read.")
            difference = first_difference(self._plan, self._plans[rank])
            first, here, there = difference or ("the plan", "one text", "another")
            self._differ(first, [0, rank], [here, there])

    def _differ(self, first: str, ranks: list[int], values: list[str]) -> None:
        self.tell_all({"kind": "differs", "first": first, "ranks": ranks, "values": values})
        raise plan_mismatch(first, ranks, values)

    def tell_all(self, message: Message) -> None:
        """Send to all ranks that are here, and see it off."""
        for connection in self._ranks.values():
            connection.send(message)
        until = time.monotonic() + 1.0
        while any(c.is_behind for c in self._ranks.values()) and time.monotonic() < until:
            time.sleep(0.01)
            for connection in self._ranks.values():
                connection.flush()

    def release(self) -> dict[int, Connection]:
        """Hand the ranks' connections over."""
        ranks, self._ranks = self._ranks, {}
        for connection in ranks.values():
            connection.limit = MESSAGE_BYTES
        return ranks

    def close(self) -> None:
        self._selector.close()
        for connection in [*self._strangers, *self._ranks.values()]:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection = Connection(self._listener.accept()[0])
            if len(self._strangers) >= MAX_STRANGERS:
                self._drop(next(iter(self._strangers)))
            self._strangers[connection] = time.monotonic() + HELLO_SECONDS
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> None:
        try:
            for message in connection.receive():
                self._take(connection, message)
        except (EOFError, Garbage, KeyError, TypeError, ValueError):
            self._drop(connection)

    def _take(self, connection: Connection, message: Message) -> None:
        if connection in self._strangers:
            self._greet(connection, message)
        elif message["kind"] == "plan":
            rank = next(r for r, other in self._ranks.items() if other is connection)
            self._plans[rank] = message["plan"]

    def _greet(self, connection: Connection, message: Message) -> None:
        """Let a rank in, if it is one of this run."""
        token = str(message["token"])
        if not hmac.compare_digest(token.encode(), self._meeting.token.encode()):
            raise Garbage("another run's")
        rank, size = int(message["rank"]), int(message["size"])
        if message["protocol"] != PROTOCOL:
            self._refuse(connection, "rank 0 runs another version of mlx_fit")
        elif size != self._meeting.size:
            del self._strangers[connection]
            self._ranks[rank] = connection  # it is told with the others
            self._differ("number of ranks", [0, rank], [str(self._meeting.size), str(size)])
        elif rank in self._ranks or not 0 < rank < size:
            self._refuse(connection, f"another process is rank {rank} already")
        else:
            del self._strangers[connection]
            self._ranks[rank], self._digests[rank] = connection, str(message["digest"])

    def _refuse(self, connection: Connection, reason: str) -> None:
        connection.send({"kind": "refused", "reason": reason})
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._strangers.pop(connection, None)
        for rank in [r for r, other in self._ranks.items() if other is connection]:
            del self._ranks[rank]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.close()


def _listen(meeting: Meeting, deadline: float) -> socket.socket:
    """A socket at the address; at any of this machine's if the address is none of them."""
    address = meeting.address
    while True:
        try:
            return _bound(address.host, address.port)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                with contextlib.suppress(OSError):
                    return _bound("::" if ":" in address.host else "", address.port)
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise RendezvousError(
                    f"Rank 0 cannot listen at {address}: {error}. Set {CONTROL}=HOST:PORT to "
                    "another address, the same on all ranks."
                ) from error
        time.sleep(_STEP)


def _bound(name: str, port: int) -> socket.socket:
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=flags)
    family, kind, protocol, _, place = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


# --- the other ranks ------------------------------------------------------------------------------


def visit(meeting: Meeting, rank: int, plan: Any) -> Connection:
    """Come to rank 0 and wait for the others; the connection. For all ranks but 0.

    Raises:
        RendezvousError: some rank did not come in time, or rank 0 refused this one.
        PlanMismatchError: plans differ.
    """
    deadline = time.monotonic() + meeting.timeout
    note, missing = "", [0]
    while time.monotonic() < deadline:
        connection = _connect(meeting.address)
        if connection is None:
            time.sleep(_STEP)
            continue
        visitor = _Visitor(connection, meeting, plan)
        connection.send(
            {
                "kind": "hello",
                "protocol": PROTOCOL,
                "token": meeting.token,
                "rank": rank,
                "size": meeting.size,
                "digest": digest(plan),
            }
        )
        try:
            # A little longer than rank 0, so that all say the same.
            while not visitor.may_go and time.monotonic() < deadline + 1.0:
                visitor.serve()
            if visitor.may_go:
                return visitor.connection
            missing = visitor.missing
        except EOFError:
            connection.close()
            missing = [0]
            note = (
                " Something answers there, but hangs up: another run's rank 0, or one that ended."
            )
            time.sleep(_STEP)
        except BaseException:
            connection.close()
            raise
    raise missing_ranks(missing, meeting, note if missing == [0] else "")


class _Visitor:
    """A rank's side of signing in."""

    def __init__(self, connection: Connection, meeting: Meeting, plan: Any) -> None:
        self.connection = connection
        self.may_go = False
        self.missing = [0]
        self._meeting = meeting
        self._plan = plan
        self._until = time.monotonic() + HELLO_SECONDS
        connection.limit = MESSAGE_BYTES

    def serve(self) -> None:
        """Handle what rank 0 says within a moment."""
        with selectors.DefaultSelector() as selector:
            events = selectors.EVENT_READ
            if self.connection.is_behind:
                events |= selectors.EVENT_WRITE
            selector.register(self.connection.sock, events)
            selector.select(_STEP)
        self.connection.flush()
        try:
            messages = self.connection.receive()
        except Garbage as error:  # something else answers at that address
            raise EOFError from error
        for message in messages:
            self._until = time.monotonic() + HELLO_SECONDS
            self._take(message)
        if time.monotonic() > self._until:
            raise EOFError  # whoever took the connection says nothing

    def _take(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "go":
            self.may_go = True
        elif kind == "waiting":
            self.missing = message["ranks"]
        elif kind == "plan?":
            self.connection.send({"kind": "plan", "plan": self._plan})
        elif kind == "missing":
            raise missing_ranks(message["ranks"], self._meeting)
        elif kind == "differs":
            raise plan_mismatch(message["first"], message["ranks"], message["values"])
        elif kind == "refused":
            raise RendezvousError(
                f"Rank 0 at {self._meeting.address} refused this process: {message['reason']}."
            )


def _connect(address: Address) -> Connection | None:
    try:
        sock = socket.create_connection((address.host, address.port), timeout=1.0)
    except OSError:
        return None
    if sock.getsockname() == sock.getpeername():  # TCP may connect a free port with itself
        sock.close()
        return None
    return Connection(sock)
