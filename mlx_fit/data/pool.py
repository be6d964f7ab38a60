"""The worker processes of a loader, as their parent sees them.

Imports layer 2: data.fetch, data.options, data.payload, data.recipe, data.worker.
"""

from __future__ import annotations

import pickle
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mlx_fit.data.fetch import describe_rows
from mlx_fit.data.options import WorkerOptions
from mlx_fit.data.payload import Segment, unpack
from mlx_fit.data.recipe import Prepared, Recipe
from mlx_fit.data.worker import PassStart, Reply, Task, work
from mlx_fit.errors import ConfigurationError, WorkerError

__all__ = ["Pool"]

_GRACE_S = 2.0  # for all workers together, to end the batch they are at


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, index: int, setup: bytes, entropy: list[int]) -> None:
        self.index = index
        self.is_ready = False
        self.tasks: deque[Task] = deque()  # given and not answered
        import multiprocessing  # slow to import, like its parts below

        context = multiprocessing.get_context("spawn")  # after a fork MLX hangs
        self.connection, other = context.Pipe()
        # Processes of the daemon kind end with their parent.
        self.process = context.Process(
            target=work,
            args=(index, other, setup, [*entropy, index]),
            name=f"mlx_fit.data-{index}",
            daemon=True,
        )
        try:
            self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            other.close()  # so that the end of the process is the end of the pipe

    def send(self, message: Any) -> None:
        # A worker that is gone is reported when its batch is due; at exit the pipe may be closed.
        with suppress(OSError):
            self.connection.send(message)

    def receive(self, timeout: float | None) -> Reply | None:
        """The next reply; None when there is none in time.

        Raises:
            EOFError: the process is gone.
        """
        from multiprocessing.connection import wait

        ready = wait([self.connection, self.process.sentinel], timeout)
        if not ready:
            return None
        if self.connection not in ready and not self.connection.poll():
            raise EOFError
        try:
            return self.connection.recv()
        except OSError as error:  # reset by a process that was killed
            raise EOFError from error


class Pool:
    """Processes that make batches in parallel; they are handed out in order.

    Batch ``k`` of a pass is made by worker ``k % num_workers``. Each worker has ``prefetch_factor``
    tasks at a time; another one is given for each batch that is taken. A stream cannot be divided,
    so one process reads it.

    Args:
        recipe: what the workers make.
        options: how many workers, and how they work.
        entropy: seeds the global random generators in the workers.

    Raises:
        ConfigurationError: the recipe cannot be pickled.
    """

    def __init__(self, recipe: Recipe, options: WorkerOptions, entropy: list[int]) -> None:
        self._recipe = recipe
        self._options = options
        from multiprocessing.util import Finalize

        self._num_passes = 0
        num_workers = 1 if recipe.is_stream else options.num_workers
        self._segments = [Segment() for _ in range(num_workers * options.prefetch_factor)]
        self._workers: list[_Worker] = []
        self.is_busy = False
        # Also when the pool is forgotten, and at the interpreter's exit, before multiprocessing
        # waits for its processes. A forked child, which owns nothing, releases nothing.
        self._release = Finalize(self, _release, (self._workers, self._segments), exitpriority=10)
        setup = _pickled(recipe, options)
        try:
            for index in range(num_workers):
                self._workers.append(_Worker(index, setup, entropy))
        except BaseException:
            self.close()
            raise

    def run(self, begin: PassStart, tasks: Iterator[tuple[int, Any]]) -> Iterator[Prepared]:
        """The batches of a pass. After an error the pool is closed.

        Args:
            begin: what pass; its number is set here.
            tasks: (number of the batch, row indices); of a stream (number, None).
        """
        self._num_passes += 1
        begin = begin._replace(number=self._num_passes)
        for worker in self._workers:
            worker.tasks.clear()
            worker.send(begin)
        self.is_busy, is_whole = True, False
        try:
            yield from self._in_order(begin, tasks)
            is_whole = True
        except GeneratorExit:
            # A pass without tasks lets the workers leave out what nobody will take.
            self._num_passes += 1
            for worker in self._workers:
                worker.send(begin._replace(number=self._num_passes))
            is_whole = True
            raise
        finally:
            self.is_busy = False
            if not is_whole:
                self.close()

    def _in_order(self, begin: PassStart, tasks: Iterator[tuple[int, Any]]) -> Iterator[Prepared]:
        given = taken = 0
        late: Exception | None = None  # raised by the sampler, due after the batches before it
        is_over = False
        while True:
            while not is_over and given < taken + len(self._segments):
                try:
                    task = next(tasks, None)
                except Exception as error:
                    task, late = None, error
                is_over = task is None
                if task is not None:
                    self._give(given, begin.number, *task)
                    given += 1
            if taken == given:
                if late is not None:
                    raise late
                return
            prepared = self._take(taken, begin)
            if prepared is None:
                return
            taken += 1
            yield prepared
            del prepared

    def _give(self, position: int, pass_number: int, batch: int, rows: Any) -> None:
        worker = self._workers[position % len(self._workers)]
        segment = self._segments[position % len(self._segments)]
        task = Task(pass_number, batch, rows, segment.name)
        worker.tasks.append(task)
        worker.send(task)

    def _take(self, position: int, begin: PassStart) -> Prepared | None:
        """The batch at ``position`` of the pass, or None where a stream ended."""
        worker = self._workers[position % len(self._workers)]
        reply = self._reply(worker, begin)
        worker.tasks.popleft()
        if reply.kind == "end":
            return None
        if reply.kind == "failure":
            raise reply.content.error(worker.index, worker.process.pid)
        segment = self._segments[position % len(self._segments)]
        batch = unpack(reply.content, segment.view)
        segment.fit(reply.content)
        return Prepared(batch, reply.num_rows, reply.dataset_state)

    def _reply(self, worker: _Worker, begin: PassStart) -> Reply:
        """The worker's next reply of this pass."""
        timeout = self._options.timeout or None
        deadline = None
        while True:
            if worker.is_ready and timeout and deadline is None:
                deadline = time.monotonic() + timeout  # starting a process does not count
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            try:
                reply = worker.receive(left)
            except EOFError:
                raise self._lost(worker, begin) from None
            if reply is None:
                raise self._stuck(worker, begin)
            if reply.kind == "ready":
                worker.is_ready = True
            elif reply.pass_number == begin.number:
                return reply
            elif reply.pass_number == -1:  # it could not be set up
                raise reply.content.error(worker.index, worker.process.pid)

    def _lost(self, worker: _Worker, begin: PassStart) -> WorkerError:
        worker.process.join(_GRACE_S)
        code = worker.process.exitcode
        killed = code is not None and code < 0
        name = _signal_name(-code) if killed and code is not None else ""
        how = f"was killed by signal {-(code or 0)} ({name})" if killed else f"exited with {code}"
        hint = _HINTS.get(name, "") if worker.is_ready else _START_HINT
        return self._error(worker, begin, how, hint, code)

    def _stuck(self, worker: _Worker, begin: PassStart) -> WorkerError:
        how = f"gave no batch for {self._options.timeout:g} s (timeout)"
        hint = "Raise timeout, or find out why the dataset hangs there."
        for other in self._workers:
            other.process.kill()  # it would not listen
        return self._error(worker, begin, how, hint, None)

    def _error(
        self, worker: _Worker, begin: PassStart, how: str, hint: str, code: int | None
    ) -> WorkerError:
        indices = [] if self._recipe.is_stream else [int(i) for t in worker.tasks for i in t.rows]
        what = "the next rows" if self._recipe.is_stream else describe_rows(indices)
        batch = worker.tasks[0].batch
        return WorkerError(
            f"Worker {worker.index} (process {worker.process.pid}) {how} with {what} in flight "
            f"(epoch {begin.epoch}, from batch {batch} on, counted from 0). {hint}".rstrip(),
            worker=worker.index,
            signal=-code if code is not None and code < 0 else None,
            exit_code=code if code is not None and code >= 0 else None,
            epoch=begin.epoch,
            batch=batch,
            indices=indices,
        )

    @property
    def is_open(self) -> bool:
        """Whether there are processes."""
        return self._release.still_active()

    def close(self) -> None:
        """End the processes and remove the shared memory. Can be called again."""
        self._release()


def _release(workers: list[_Worker], segments: list[Segment]) -> None:
    for worker in workers:
        if not worker.is_ready and not worker.connection.poll():
            worker.process.kill()  # it is still importing: nothing is lost
        worker.connection.close()
    deadline = time.monotonic() + _GRACE_S
    for worker in workers:
        worker.process.join(max(deadline - time.monotonic(), 0))
    for worker in workers:
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.process.close()
    # Only now: a worker that attached a removed segment would leave it registered for ever.
    for segment in segments:
        segment.close()


_START_HINT = (
    "It had not started up yet: a script that uses num_workers must do its work under "
    'if __name__ == "__main__":, because each worker imports it.'
)
_HINTS = {
    "SIGKILL": "Something killed it; often the system does when memory runs out.",
    "SIGSEGV": "Native code called by the dataset crashed.",
    "SIGBUS": "The system may have run out of shared memory (/dev/shm).",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _pickled(recipe: Recipe, options: WorkerOptions) -> bytes:
    parts = {
        "dataset": recipe.dataset,
        "collate_fn": recipe.collate_fn,
        "worker_init_fn": options.worker_init_fn,
    }
    try:
        return pickle.dumps((recipe, options.worker_init_fn), protocol=5)
    except Exception as error:
        guilty = next((name for name, part in parts.items() if not _can_pickle(part)), "dataset")
        raise ConfigurationError(
            f"num_workers={options.num_workers} needs a {guilty} that can be pickled, but: {error} "
            "Use functions and classes of a module instead of lambdas and local ones, open files "
            "in the worker, or use num_workers=0."
        ) from error


def _can_pickle(part: Any) -> bool:
    try:
        pickle.dumps(part, protocol=5)
    except Exception:
        return False
    return True
