"""Who makes the batches of a pass: the caller's thread, a thread ahead of it, or processes.

Imports layer 2: data.fetch, data.options, data.pool, data.position, data.prefetch, data.recipe,
data.worker.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from time import perf_counter
from typing import Any

from mlx_fit.data.fetch import describe_rows
from mlx_fit.data.options import WorkerOptions
from mlx_fit.data.pool import Pool
from mlx_fit.data.position import Position
from mlx_fit.data.prefetch import ahead
from mlx_fit.data.recipe import MlxWatch, Prepared, Recipe
from mlx_fit.data.worker import PassStart
from mlx_fit.errors import WorkerError

__all__ = ["Reader"]

# Handing a batch from thread to thread costs 7 to 15 us, and more while both want the interpreter.
# Below this a batch is cheaper made where it is wanted.
_SLOW_S = 5e-4
_FOREIGN_STREAM = "There is no Stream"  # MLX, of an array made lazily in another thread


class Reader:
    """Makes the batches of one pass after another.

    Without processes, batches are first made in the caller's thread. After two in a row that took
    longer than half a millisecond, the second of which is looked through for MLX arrays, the rest
    is made in a thread. MLX arrays keep a dataset in the caller's thread: lazy ones can be
    evaluated only there, and random numbers of MLX have a key for each thread.

    Args:
        recipe: the dataset and how to batch it.
        options: threads and processes.

    Attributes:
        wait_seconds: time that consumers spent waiting for batches, over all passes.
    """

    def __init__(self, recipe: Recipe, options: WorkerOptions) -> None:
        self._recipe = recipe
        self._options = options
        self._pool: Pool | None = None
        self.wait_seconds = 0.0
        # An iterator is not read ahead: what is left early would be lost.
        self._may_thread = options.prefetch_factor > 0 and not recipe.is_one_shot
        self._is_threaded = options.timeout > 0

    def read(
        self,
        position: Position,
        seed: int,
        tasks: Iterator[tuple[int, Any]],
        on_end: Callable[[Position], None],
    ) -> Iterator[Any]:
        """The batches of a pass. ``position`` follows what was handed out.

        Args:
            position: where the pass starts.
            seed: of the loader.
            tasks: (number of the batch, its row indices); of a stream (number, its rows), or
                (number, None) with processes.
            on_end: called when all batches were taken.
        """
        direct = not (self._options.num_workers or self._is_threaded)
        fetch = self._recipe.fetch(seed, position.epoch)
        num_slow, watch, epoch = 0, MlxWatch(), position.epoch
        while direct:
            start = perf_counter()
            task = next(tasks, None)
            if task is None:
                break
            number, rows = task
            batch = fetch(rows, epoch, number)
            waited = perf_counter() - start
            self.wait_seconds += waited
            position.samples_consumed += len(rows)
            if self._recipe.is_stream:
                position.dataset_state = self._recipe.state()
            yield batch
            if waited > _SLOW_S and self._may_thread:
                num_slow += 1
                if num_slow == 1:
                    fetch = self._recipe.fetch(seed, epoch, watch)
                else:
                    self._may_thread = not watch.found
                    self._is_threaded = self._may_thread
                    direct = not self._is_threaded
            elif num_slow:
                num_slow, fetch = 0, self._recipe.fetch(seed, epoch)
            del batch
        else:
            yield from self._read_ahead(position, seed, tasks)
        on_end(position)

    def _read_ahead(
        self, position: Position, seed: int, tasks: Iterator[tuple[int, Any]]
    ) -> Iterator[Any]:
        batches = self._threaded(position.epoch, seed, tasks)
        if self._options.num_workers:
            batches = self._in_processes(position, seed, tasks)
        try:
            while True:
                start = perf_counter()
                prepared = next(batches, None)
                self.wait_seconds += perf_counter() - start
                if prepared is None:
                    return
                position.samples_consumed += prepared.num_rows
                position.dataset_state = prepared.dataset_state
                yield prepared.batch
                del prepared  # or its memory would live until the next one is here
        finally:
            batches.close()  # ends threads and processes also where a traceback holds on to them

    def _threaded(
        self, epoch: int, seed: int, tasks: Iterator[tuple[int, Any]]
    ) -> Generator[Prepared, None, None]:
        fetch = self._recipe.fetch(seed, epoch)

        def make(task: tuple[int, Any]) -> Prepared | tuple[int, Any]:
            number, rows = task
            try:
                batch = fetch(rows, epoch, number)
            except RuntimeError as error:
                if _FOREIGN_STREAM not in str(error):
                    raise
                return task
            return Prepared(batch, len(rows), self._recipe.state())

        def stuck(task: tuple[int, Any] | None) -> WorkerError:
            return self._stuck(epoch, task)

        depth, timeout = self._options.prefetch_factor, self._options.timeout
        for made in ahead(make, tasks, depth, timeout, stuck):
            if isinstance(made, Prepared):
                yield made
            else:  # the dataset holds lazy MLX arrays, which only this thread can evaluate
                self._may_thread, self._is_threaded = False, timeout > 0
                number, rows = made
                yield Prepared(fetch(rows, epoch, number), len(rows), self._recipe.state())

    def _stuck(self, epoch: int, task: tuple[int, Any] | None) -> WorkerError:
        number, rows = (None, ()) if task is None or self._recipe.is_stream else task
        what = describe_rows(rows) if len(rows) else "the next rows"
        return WorkerError(
            f"The thread that reads ahead gave no batch for {self._options.timeout:g} s (timeout): "
            f"it is reading {what} (epoch {epoch}, batch {number}). Raise timeout, or find out why "
            "the dataset hangs there.",
            epoch=epoch,
            batch=number,
            indices=rows,
        )

    def _in_processes(
        self, position: Position, seed: int, tasks: Iterator[tuple[int, Any]]
    ) -> Generator[Prepared, None, None]:
        start, state = position.samples_consumed, position.dataset_state
        begin = PassStart(0, seed, position.epoch, start, state)
        pool = self._idle_pool()
        if pool is None:
            pool = Pool(self._recipe, self._options, [seed % 2**32, position.epoch])
            if self._options.persistent_workers and self._pool is None:
                self._pool = pool
        try:
            yield from pool.run(begin, tasks)
        finally:
            if pool is not self._pool:
                pool.close()

    def _idle_pool(self) -> Pool | None:
        """The workers of an earlier pass, if they live and another iterator does not use them."""
        if self._pool is not None and not self._pool.is_open:
            self._pool = None
        return None if self._pool is None or self._pool.is_busy else self._pool
