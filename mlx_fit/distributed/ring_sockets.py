"""The sockets of MLX's ring in this process: found by port, to see what moves and to cut them.

MLX offers no timeout and no way to end a collective that waits. Its sockets are ordinary ones,
though: once shut down, the collective ends in ``[ring] connection to a peer was lost``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

from mlx_fit.distributed.environment import Address

_RECEIVED = struct.Struct("=Q")
_RECEIVED_AT = 128  # tcpi_bytes_received in Linux's struct tcp_info


class RingSockets:
    """The connections of one rank with its two neighbours.

    Args:
        addresses: where the ring of each rank listens; [] if the backend is no ring.
        rank: this one.
    """

    def __init__(self, addresses: list[list[Address]], rank: int) -> None:
        self._size = len(addresses)
        self._rank = rank
        ports = [{address.port for address in ours} for ours in addresses]
        self._own = ports[rank] if rank < self._size else set()
        self._right = ports[(rank + 1) % self._size] if self._size else set()

    def cut(self) -> int:
        """Shut all of them down, which ends a collective that waits; returns their number."""
        number = 0
        for sock, _ in self._sockets():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            number += 1
        return number

    def num_received(self) -> int:
        """Bytes that have come in so far; 0 where the system does not tell (all but Linux)."""
        if sys.platform != "linux":
            return 0
        total = 0
        for sock, _ in self._sockets():
            with contextlib.suppress(OSError, struct.error):
                facts = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
                total += _RECEIVED.unpack_from(facts, _RECEIVED_AT)[0]
        return total

    def broken_neighbour(self) -> int | None:
        """The rank at the other end of a connection that is closed or broken, if there is one."""
        sound = set()
        for sock, neighbour in self._sockets():
            try:
                if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                    return neighbour
            except BlockingIOError:
                pass
            except OSError:
                return neighbour
            sound.add(neighbour)
        both = {(self._rank - 1) % self._size, (self._rank + 1) % self._size} if self._size else ()
        return next(iter(set(both) - sound), None)  # a reset one has lost its peer's name

    def _sockets(self) -> Iterator[tuple[socket.socket, int]]:
        """A duplicate of each, and the neighbour behind it; closed when the next is asked for."""
        if not self._size:
            return
        for number in _open_files():
            try:
                if not stat.S_ISSOCK(os.fstat(number).st_mode):
                    continue
                sock = socket.socket(fileno=os.dup(number))
            except OSError:
                continue
            with sock:
                neighbour = self._neighbour(sock)
                if neighbour is not None:
                    yield sock, neighbour

    def _neighbour(self, sock: socket.socket) -> int | None:
        if sock.family != socket.AF_INET or sock.type != socket.SOCK_STREAM:
            return None
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return None
            if sock.getsockname()[1] in self._own:  # the left neighbour came to us
                return (self._rank - 1) % self._size
            if sock.getpeername()[1] in self._right:
                return (self._rank + 1) % self._size
        return None


def _open_files() -> list[int]:
    return [int(name) for name in os.listdir("/dev/fd") if name.isdigit()]
