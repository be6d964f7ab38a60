"""Messages over TCP: JSON objects, each after its length in four bytes."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

Message = dict[str, Any]
HELLO_BYTES = 4096  # what a stranger may send
MESSAGE_BYTES = 64 << 20  # a plan of a very deep model
_LENGTH = struct.Struct(">I")


class Garbage(Exception):
    """What came is no message of ours."""


def encode(message: Message) -> bytes:
    """A message as it travels."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text


class Connection:
    """One end of a TCP connection, never blocking, that sends and receives messages.

    Args:
        sock: a connected socket; it belongs to the connection from now on.
        limit: bytes that one message may have.
    """

    def __init__(self, sock: socket.socket, limit: int = HELLO_BYTES) -> None:
        self.sock = sock
        self.limit = limit
        self._received = bytearray()
        self._waiting = bytearray()
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def is_behind(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._waiting)

    def receive(self) -> list[Message]:
        """The messages that have arrived.

        Raises:
            EOFError: the other end closed, or the connection broke.
            Garbage: something else than messages came.
        """
        is_closed = False
        while not is_closed:
            try:
                part = self.sock.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                part = b""
            is_closed = not part
            self._received += part
            if len(self._received) > self.limit + _LENGTH.size:
                break  # the rest is read when this has been looked at
        messages = self._messages()
        if is_closed and not messages:
            raise EOFError
        return messages  # once closed, the next call reads nothing again and raises

    def _messages(self) -> list[Message]:
        messages = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > self.limit:
                raise Garbage(f"a message of {length} bytes; at most {self.limit} are read")
            if len(self._received) < _LENGTH.size + length:
                break
            text = bytes(self._received[_LENGTH.size : _LENGTH.size + length])
            del self._received[: _LENGTH.size + length]
            messages.append(_decode(text))
        return messages

    def send(self, message: Message) -> None:
        """Send, or keep for :meth:`flush` what the network does not take now."""
        self._waiting += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the network takes it. A broken connection takes all of it."""
        while self._waiting:
            try:
                del self._waiting[: self.sock.send(self._waiting)]
            except BlockingIOError:
                return
            except OSError:  # whoever reads from it will notice
                self._waiting.clear()

    def close(self) -> None:
        """Close it; what waits is lost."""
        self.sock.close()


def _decode(text: bytes) -> Message:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Garbage(str(error)) from error
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise Garbage("no object with a kind")
    return message
