"""What a run prints: a live bar, or a line per epoch.

A bar redraws at most ten times a second, and only then is it called and are values read from the
device; between redraws a batch costs one look at the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.format import (
    format_seconds,
    format_share,
    format_values,
    summary_line,
    values_of,
)
from mlx_fit.callbacks.screen import Notebook, Screen, Terminal, in_notebook
from mlx_fit.errors import ConfigurationError
from mlx_fit.pace import Pace
from mlx_fit.runtime.memory import active_bytes, format_bytes

REDRAW_SECONDS = 0.1


def resolve_verbose(verbose: int | str) -> int:
    """0, 1 or 2; ``"auto"`` is 1 on a terminal or in a notebook and 2 elsewhere."""
    if verbose == "auto":
        return 1 if sys.stdout.isatty() or in_notebook() else 2
    if verbose in (0, 1, 2) and not isinstance(verbose, str):
        return int(verbose)
    raise ConfigurationError(f"verbose={verbose!r}; expected 0, 1, 2 or 'auto'.")


def progress(verbose: int) -> list[Callback]:
    """The callbacks that print, for a resolved ``verbose``."""
    return [Bars()] if verbose == 1 else [Lines()] if verbose == 2 else []


class Lines(Callback):
    """One line per epoch, for logs, pipes and CI."""

    first_rank_only = True

    def __init__(self) -> None:
        self._start = 0.0
        self._num_tested = 0

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        if self.trainer.info.epochs > 1:
            print(f"Epoch {epoch + 1}/{self.trainer.info.epochs}", flush=True)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Print the epoch."""
        run = self.trainer
        self._print(run.num_batches, run.info.steps_per_epoch, logs, run.pace)

    def on_test_begin(self, logs: Any) -> None:
        """Start the clock of a lone evaluation."""
        if self.trainer.info.kind == "evaluate":
            self._start = time.perf_counter()

    def on_test_batch_end(self, batch: int, logs: Any) -> None:
        """Count."""
        self._num_tested = batch + 1

    def on_test_end(self, logs: Any) -> None:
        """Print a lone evaluation; in ``fit`` the epoch's line holds its values."""
        if self.trainer.info.kind == "evaluate":
            self._print(self._num_tested, self.trainer.info.steps_per_epoch, logs)

    def _print(
        self, count: int, expected: int | None, logs: Mapping[str, Any], pace: Pace | None = None
    ) -> None:
        seconds = time.perf_counter() - self._start
        print(summary_line(count, expected, seconds, logs, pace), flush=True)


@dataclass
class Bar:
    """How far one pass over batches is."""

    title: str = ""
    total: int | None = None
    count: int = 0
    start: float = field(default_factory=time.perf_counter)
    is_counted: bool = True
    pace: Pace | None = None

    def line(self, width: int, pieces: Iterable[str] = ()) -> str:
        """The bar in one line: as many of ``pieces`` as fit beside what must be there."""
        total = "?" if self.total is None else self.total
        count = f"{self.count}/{total}" if self.is_counted else ""
        parts = [self.title, self._bar(width), count, self._time_left()]
        text = " ".join(part for part in parts if part)
        for piece in pieces:
            if len(text) + 3 + len(piece) >= width:
                break
            text += f" - {piece}"
        return text[: width - 1].rstrip()

    def _bar(self, width: int) -> str:
        if not self.total:
            return ""
        cells = min(20, width // 5)
        filled = min(self.count * cells // self.total, cells)
        return "━" * filled + "─" * (cells - filled)

    def _time_left(self) -> str:
        if not self.total or not self.count:
            return ""
        done, seconds = self.count, time.perf_counter() - self.start
        if self.pace is not None:  # without what came before a resume, and without evaluations
            done, seconds = self.pace.num_batches, self.pace.seconds
        return format_seconds(seconds / max(done, 1) * max(self.total - self.count, 0))


class Bars(Callback):
    """A live bar for training, validation and prediction, and a line for each finished epoch."""

    first_rank_only = True

    def __init__(self) -> None:
        self._screen: Screen = Notebook() if in_notebook() else Terminal()
        self._training = self._current = Bar()
        self._lengths: dict[str, int] = {}  # kind of pass -> batches it had the last time
        self._num_validated = 0
        self._saves_are_quick = self._shows_save = False
        self.due_at: float = 0.0

    # --- fit --------------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Show the epoch's bar."""
        info = self.trainer.info
        title = f"Epoch {epoch + 1}/{info.epochs}" if info.epochs > 1 else "Training"
        self._num_validated = 0
        total = info.steps_per_epoch or self._lengths.get("Training")
        self._training = self._begin(title, total)
        self._training.pace = self.trainer.pace

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Redraw: called only when the last time is long enough ago."""
        self._training.count = batch + 1
        self._draw(logs, self._facts)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Take the bar away, leave the line."""
        info, bar = self.trainer.info, self._training
        seconds = time.perf_counter() - bar.start
        self._lengths["Training"] = bar.count = self.trainer.num_batches
        self._screen.clear()
        head = f"{bar.title} - " if info.epochs > 1 else ""
        line = summary_line(bar.count, info.steps_per_epoch, seconds, logs, self.trainer.pace)
        print(head + line, flush=True)

    def on_save_begin(self, logs: Any) -> None:
        """Say why training stands still; quick saves, one after the other, share redraws."""
        self._training.count = self.trainer.num_batches
        self._current = Bar(f"Saving step {self.trainer.step}", is_counted=False)
        if not self._saves_are_quick or self._current.start >= self.due_at:
            self._draw({})
            self._shows_save = True

    def on_save_end(self, logs: Any) -> None:
        """Go back to the epoch's bar, with the next batch."""
        self._saves_are_quick = time.perf_counter() - self._current.start < REDRAW_SECONDS
        self._current = self._training
        if self._shows_save:
            self._shows_save, self.due_at = False, 0.0

    def on_exception(self, error: BaseException) -> None:
        """Leave the terminal as it was."""
        self._screen.clear()

    def on_train_end(self, logs: Any) -> None:
        """Leave the terminal as it was, also where a signal cut an epoch short."""
        self._screen.clear()

    # --- evaluation and prediction ----------------------------------------------------------------

    def on_test_begin(self, logs: Any) -> None:
        """Show a bar: below the epoch's in ``fit``, else alone."""
        info = self.trainer.info
        if info.kind == "evaluate":
            self._begin("Evaluating", info.steps_per_epoch)
            return
        self._training.count = self.trainer.num_batches
        name = info.validation_sets[self._num_validated % len(info.validation_sets)]
        self._num_validated += 1
        title = f"Validating {name}".rstrip()
        self._begin(title, self._lengths.get(title))

    def on_test_batch_end(self, batch: int, logs: Any) -> None:
        """Redraw, if the last time is long enough ago."""
        self._current.count = batch + 1
        if time.perf_counter() >= self.due_at:
            self._draw(logs)

    def on_test_end(self, logs: Any) -> None:
        """Go back to the epoch's bar; a lone evaluation leaves a line."""
        self._lengths[self._current.title] = self._current.count
        self._current = self._training
        if self.trainer.info.kind == "evaluate":
            self._screen.clear()
            print(format_values(logs), flush=True)

    def on_predict_begin(self, logs: Any) -> None:
        """Show a bar."""
        self._begin("Predicting", self.trainer.info.steps_per_epoch)

    def on_predict_batch_end(self, batch: int, logs: Any) -> None:
        """Redraw, if the last time is long enough ago."""
        self._current.count = batch + 1
        if time.perf_counter() >= self.due_at:
            self._draw({})

    def on_predict_end(self, logs: Any) -> None:
        """Take the bar away."""
        self._screen.clear()

    # --- drawing ----------------------------------------------------------------------------------

    def _begin(self, title: str, total: int | None) -> Bar:
        self._current = Bar(title, total)
        # Passes shorter than the time between redraws share them.
        if time.perf_counter() >= self.due_at:
            self._draw({})
        return self._current

    def _draw(self, logs: Any, facts: Callable[[Any], list[str]] | None = None) -> None:
        # Reading logs and facts waits for the device: the price of a redraw, not of a batch.
        pieces = [*values_of(logs), *(facts(logs) if facts else [])]
        width, current = self._screen.width, self._current
        above = [] if current is self._training else [self._training.line(width)]
        lines = [*(above if self._training.title else []), current.line(width, pieces)]
        self._screen.draw(lines)
        self.due_at = time.perf_counter() + REDRAW_SECONDS

    def _facts(self, logs: Any) -> list[str]:
        pace = self.trainer.pace
        each, unit = self._work_of_a_batch(logs)
        rate = pace.num_batches * each / pace.seconds
        facts = [
            f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s",
            f"{format_share(pace)} data wait",
            format_bytes(active_bytes()),
        ]
        if (learning_rate := self.trainer.learning_rate) is not None:
            facts.insert(0, f"lr {learning_rate:.2e}")
        return facts

    def _work_of_a_batch(self, logs: Any) -> tuple[float, str]:
        """What a batch holds: tokens where they are counted, else rows, else itself."""
        if num_tokens := logs.get("num_tokens"):
            return num_tokens / max(self.trainer.num_batches, 1), "tokens"
        size = self.trainer.info.batch_size
        return (size, "examples") if size else (1, "steps")
