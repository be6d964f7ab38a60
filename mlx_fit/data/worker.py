"""A worker process of a loader: gets tasks, gives batches.

Imports layer 2: data.payload, data.recipe.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_fit.data.payload import attach, failure, pack
from mlx_fit.data.recipe import Recipe, refuse_mlx

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.shared_memory import SharedMemory

__all__ = ["PassStart", "Reply", "Task", "work"]

_GRACE_S = 5.0  # how long a worker whose parent is gone may take over its batch


class PassStart(NamedTuple):
    """Tells a worker that a pass over the data begins; stale tasks are dropped."""

    number: int
    seed: int
    epoch: int
    start: int  # samples before the first batch, for a stream
    dataset_state: Any


class Task(NamedTuple):
    """Asks for a batch. Of a stream the next one, so ``rows`` is None."""

    pass_number: int
    batch: int
    rows: Any
    segment: str | None


class Reply(NamedTuple):
    """What became of a task: ``kind`` is ready, batch, end or failure."""

    pass_number: int
    kind: str
    content: Any = None
    num_rows: int = 0
    dataset_state: Any = None


class _Inbox:
    """Messages of the parent, read by a thread so that the parent never waits for a busy worker."""

    def __init__(self, connection: Connection) -> None:
        self.pass_number = -1  # the newest
        self.messages: SimpleQueue[Any] = SimpleQueue()
        self._connection = connection
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, PassStart):
                    self.pass_number = message.number
                self.messages.put(message)
        except (EOFError, OSError):
            # Closed, or the parent is gone. A batch that hangs must not outlive it.
            self.pass_number = -1
            self.messages.put(None)
            time.sleep(_GRACE_S)
            os._exit(1)


def work(index: int, connection: Connection, setup: bytes, entropy: list[int]) -> None:
    """The life of a worker.

    Args:
        index: its number.
        connection: to the parent.
        setup: the pickled recipe and worker_init_fn.
        entropy: seeds the global generators of NumPy and Python, differently for each worker.
    """
    # These reach all processes of a group, but a fit still needs batches to end its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox = _Inbox(connection)
    np.random.seed(entropy)  # noqa: NPY002 - it is the global one that datasets may draw from
    random.seed(str(entropy))
    attached: dict[str, SharedMemory] = {}
    with suppress(BrokenPipeError, ConnectionResetError):  # the parent has left early
        try:
            recipe, init = pickle.loads(setup)
            if init is not None:
                init(index)
        except Exception as error:
            connection.send(Reply(-1, "failure", failure(error)))
            return
        connection.send(Reply(-1, "ready"))
        _serve(recipe, inbox, connection, attached)
    for memory in attached.values():
        memory.close()


def _serve(
    recipe: Recipe, inbox: _Inbox, connection: Connection, attached: dict[str, SharedMemory]
) -> None:
    make: Callable[[Task], Any] | None = None
    while (message := inbox.messages.get()) is not None:
        if isinstance(message, PassStart):
            begin, make = message, None
        elif message.pass_number == inbox.pass_number:
            try:
                make = make or _maker(recipe, begin)
                reply = _reply(make(message), recipe, message, attached)
            except Exception as error:
                reply = Reply(message.pass_number, "failure", failure(error))
            connection.send(reply)


def _maker(recipe: Recipe, begin: PassStart) -> Callable[[Task], Any]:
    """A function from a task of the pass to (batch, rows in it), or None at a stream's end."""
    fetch = recipe.fetch(begin.seed, begin.epoch, refuse_mlx)
    stream: Iterator[Any] | None = None
    if recipe.is_stream:
        stream = recipe.stream(begin.epoch, begin.start, begin.dataset_state)

    def make(task: Task) -> Any:
        rows = task.rows if stream is None else next(stream, None)
        return None if rows is None else (fetch(rows, begin.epoch, task.batch), len(rows))

    return make


def _reply(made: Any, recipe: Recipe, task: Task, attached: dict[str, SharedMemory]) -> Reply:
    if made is None:
        return Reply(task.pass_number, "end")
    batch, num_rows = made
    parcel = pack(batch, attach(task.segment, attached))
    return Reply(task.pass_number, "batch", parcel, num_rows, recipe.state())
