"""A thread that works ahead of its consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

__all__ = ["ahead"]

_GRACE_S = 5.0  # how long leaving waits for the thread to end its batch


class _Shared:
    """What the thread and its consumer both see."""

    def __init__(self, depth: int) -> None:
        self.tickets: SimpleQueue[None] = SimpleQueue()  # one for each result that may be made
        self.results: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.current: Any = None  # the task in work; None while the next one is looked for
        self.is_over = False
        for _ in range(depth):
            self.tickets.put(None)


def ahead(
    make: Callable[[Any], Any],
    tasks: Iterator[Any],
    depth: int,
    timeout: float,
    stuck: Callable[[Any], Exception],
) -> Iterator[Any]:
    """``make(task)`` for each task, made in a thread, at most ``depth`` ahead of what was taken.

    The thread starts when the first result is asked for, and ends with the iterator, also where
    that is left early. An exception comes in its turn, after the results before it.

    Args:
        make: called in the thread.
        tasks: iterated over in the thread.
        depth: results that may wait.
        timeout: seconds to wait for one; 0 waits for ever.
        stuck: makes the error to raise when the timeout has passed, from the task in work.
    """
    shared, grace = _Shared(depth), _GRACE_S
    # A daemon: a read that hangs must not keep the interpreter from ending.
    thread = Thread(target=_work, args=(make, tasks, shared), name="mlx_fit.data", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, result = shared.results.get(timeout=timeout or None)
            except Empty:
                grace = 0.0
                raise stuck(shared.current) from None
            if kind == "error":
                raise result
            if kind == "end":
                return
            shared.tickets.put(None)
            yield result
            del result  # or the batch would live until the next one is here
    finally:
        shared.is_over = True
        shared.tickets.put(None)
        thread.join(grace)


def _work(make: Callable[[Any], Any], tasks: Iterator[Any], shared: _Shared) -> None:
    try:
        while True:
            shared.tickets.get()
            if shared.is_over:
                return
            shared.current = None
            task = next(tasks, None)
            if task is None:
                shared.results.put(("end", None))
                return
            shared.current = task
            shared.results.put(("result", make(task)))
    except BaseException as error:
        shared.results.put(("error", error))
