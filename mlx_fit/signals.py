"""Ctrl-C and SIGTERM while ``fit`` runs: a request first, force only when asked twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """Which signal asked the run to end, if any."""

    def __init__(self) -> None:
        self.name: str | None = None


@contextmanager
def watched(interruption: Interruption) -> Iterator[None]:
    """Note SIGINT and SIGTERM in ``interruption``; earlier handlers are put back at the end.

    A second SIGINT raises ``KeyboardInterrupt`` at once. The user's own SIGTERM handler runs as
    well. A signal that is ignored (as under ``nohup``) stays ignored. Outside the main thread
    Python allows no handlers, and nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if interruption.name is not None:
            raise KeyboardInterrupt
        interruption.name = "SIGINT"

    def on_terminate(signum: int, frame: FrameType | None) -> None:
        interruption.name = "SIGTERM"
        if callable(earlier[signal.SIGTERM]):
            earlier[signal.SIGTERM](signum, frame)

    earlier: dict[signal.Signals, Any] = {}
    handlers = {signal.SIGINT: on_interrupt, signal.SIGTERM: on_terminate}
    for number, handler in handlers.items():
        # A handler that Python did not install reads as None and could not be put back.
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            earlier[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)
