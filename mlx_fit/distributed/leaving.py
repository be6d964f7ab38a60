"""How a rank leaves: with the right exit code, with a word to the others, and whatever happens."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from mlx_fit.errors import DistributedError

RESTART_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Leaver(Protocol):
    """What wants to know that the process ends."""

    def report(self, error: BaseException, step: int | None = None) -> None:
        """The process ends by this."""

    def close(self) -> None:
        """It ends in order."""


_leavers: list[Leaver] = []
_is_installed = False


def set_exit_codes() -> None:
    """Errors between ranks give their exit codes from now on, and leavers are told.

    Installs, once, a ``sys.excepthook`` that calls the one before, and an exit handler.
    """
    global _is_installed
    if not _is_installed:
        _is_installed = True
        sys.excepthook = _Hook(sys.excepthook)
        atexit.register(_close_all)


def enter(leaver: Leaver) -> None:
    """Have it told when this process ends, until :func:`forget`."""
    _leavers.append(leaver)


def forget(leaver: Leaver) -> None:
    """It has left already."""
    if leaver in _leavers:
        _leavers.remove(leaver)


class _Hook:
    """Prints an uncaught exception as before, tells the other ranks, and sets the exit code."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self._before = before

    def __call__(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        self._before(kind, error, traceback)
        for leaver in list(_leavers):
            leaver.report(error)
        if isinstance(error, DistributedError) and error.exit_code != 1:
            raise SystemExit(error.exit_code)


def _close_all() -> None:
    for leaver in list(_leavers):
        leaver.close()


def leave(code: int, reason: str) -> None:
    """End the process at once, with the stacks of all threads on standard error.

    For a main thread that is held in a collective and cannot be reached.
    """
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(0.3)  # the main thread may hold a stream's lock
    with contextlib.suppress(OSError):
        os.write(2, f"mlx_fit: {reason} Leaving with exit code {code}.\n".encode())
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.dump_traceback(file=2, all_threads=True)
    os._exit(code)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()


class SignalTap:
    """Shows signals at once to a thread that selects on ``reader``, whatever the main thread does.

    Python runs a signal's handler in the main thread, between two instructions, so not while that
    is held in a collective. The C level writes each signal's number to a file, though. Handlers
    stay as they are; a signal without a Python handler is not shown. Outside the main thread
    nothing can be tapped, and ``reader`` never has anything to read.
    """

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._before = -1
        self._is_set = threading.current_thread() is threading.main_thread()
        if self._is_set:
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def read(self) -> list[int]:
        """Numbers of the signals since the last call; whoever tapped before us gets them, too."""
        try:
            numbers = self.reader.recv(64)
        except OSError:
            return []
        if self._before >= 0:
            with contextlib.suppress(OSError):
                os.write(self._before, numbers)
        return list(numbers)

    def close(self) -> None:
        """Put the earlier tap back. From another thread that is not possible: it stays, unread."""
        if self._is_set:
            if threading.current_thread() is not threading.main_thread():
                return
            now = signal.set_wakeup_fd(-1)
            is_ours = now == self._writer.fileno()
            signal.set_wakeup_fd(self._before if is_ours else now)
        self.reader.close()
        self._writer.close()
