"""What a run prints: a live bar, or a line per epoch.

A bar redraws at most ten times a second, and only then are values read from the device; between
redraws a batch costs one look at the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.errors import ConfigurationError
from mlx_fit.runtime.memory import active_bytes, format_bytes

REDRAW_SECONDS = 0.1


def resolve_verbose(verbose: int | str) -> int:
    """0, 1 or 2; ``"auto"`` is 1 on a terminal or in a notebook and 2 elsewhere."""
    if verbose == "auto":
        return 1 if sys.stdout.isatty() or _in_notebook() else 2
    if verbose in (0, 1, 2) and not isinstance(verbose, str):
        return int(verbose)
    raise ConfigurationError(f"verbose={verbose!r}; expected 0, 1, 2 or 'auto'.")


def progress(verbose: int) -> list[Callback]:
    """The callbacks that print, for a resolved ``verbose``."""
    return [Bars()] if verbose == 1 else [Lines()] if verbose == 2 else []


def format_value(value: float) -> str:
    """Four decimals, or scientific below a thousandth, as Keras prints values."""
    return f"{value:.4f}" if abs(value) > 1e-3 or value == 0 else f"{value:.4e}"


def format_values(logs: Mapping[str, Any]) -> str:
    """``loss: 0.5000 - accuracy: 0.9000``; matrices are left out."""
    numbers = [(k, v) for k, v in logs.items() if isinstance(v, (int, float))]
    return " - ".join(f"{key}: {format_value(value)}" for key, value in numbers)


def format_seconds(seconds: float) -> str:
    """``4s``, ``1:05`` or ``2:03:04``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Lines(Callback):
    """One line per epoch, for logs, pipes and CI."""

    def __init__(self) -> None:
        self._start = 0.0
        self._num_batches = 0
        self._num_tested = 0

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._num_batches = 0
        if self.trainer.info.epochs > 1:
            print(f"Epoch {epoch + 1}/{self.trainer.info.epochs}", flush=True)

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Count."""
        self._num_batches = batch + 1

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Print the epoch."""
        self._print(self._num_batches, self.trainer.info.steps_per_epoch, logs)

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

    def _print(self, count: int, expected: int | None, logs: Mapping[str, Any]) -> None:
        seconds = time.perf_counter() - self._start
        print(summary_line(count, expected, seconds, logs), flush=True)


def summary_line(count: int, expected: int | None, seconds: float, logs: Mapping[str, Any]) -> str:
    """``4/4 - 1s - 246ms/step - loss: 14.7808``."""
    each_ms = 1e3 * seconds / max(count, 1)
    each = f"{each_ms:.0f}ms/step" if each_ms >= 1 else f"{1e3 * each_ms:.0f}us/step"
    total = count if expected is None else expected
    parts = [f"{count}/{total}", format_seconds(seconds), each, format_values(logs)]
    return " - ".join(part for part in parts if part)


class Bars(Callback):
    """A live bar for training, validation and prediction, and a line for each finished epoch."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._start = 0.0
        self._next_redraw = 0.0
        self._num_batches = 0

    # --- fit --------------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Show the epoch's bar."""
        info = self.trainer.info
        title = f"Epoch {epoch + 1}/{info.epochs}" if info.epochs > 1 else "Training"
        self._show(title, info.steps_per_epoch)

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Redraw, if the last time is long enough ago."""
        self._num_batches = batch + 1
        if time.perf_counter() >= self._next_redraw:
            self._redraw(logs, self._facts())

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Take the bar away, leave the line."""
        seconds, info = time.perf_counter() - self._start, self.trainer.info
        self._hide()
        head = f"Epoch {epoch + 1}/{info.epochs} - " if info.epochs > 1 else ""
        print(head + summary_line(self._num_batches, info.steps_per_epoch, seconds, logs))

    def on_exception(self, error: BaseException) -> None:
        """Leave the terminal as it was."""
        self._hide()

    def on_train_end(self, logs: Any) -> None:
        """Leave the terminal as it was, also where a signal cut an epoch short."""
        self._hide()

    # --- evaluation and prediction ----------------------------------------------------------------

    def on_test_begin(self, logs: Any) -> None:
        """Show a bar: below the epoch's in ``fit``, else alone."""
        if self.trainer.info.kind == "evaluate":
            self._show("Evaluating", self.trainer.info.steps_per_epoch)
        elif self._progress is not None:
            self._task = self._add("Validating", None)

    def on_test_batch_end(self, batch: int, logs: Any) -> None:
        """Redraw, if the last time is long enough ago."""
        if self._progress is not None and time.perf_counter() >= self._next_redraw:
            self._update(batch + 1, logs, "")

    def on_test_end(self, logs: Any) -> None:
        """Take the bar away; a lone evaluation leaves a line."""
        if self.trainer.info.kind == "evaluate":
            self._hide()
            print(format_values(logs))
        elif self._progress is not None:
            self._progress.remove_task(self._task)
            self._task = self._progress.task_ids[0]

    def on_predict_begin(self, logs: Any) -> None:
        """Show a bar."""
        self._show("Predicting", self.trainer.info.steps_per_epoch)

    def on_predict_batch_end(self, batch: int, logs: Any) -> None:
        """Redraw, if the last time is long enough ago."""
        if time.perf_counter() >= self._next_redraw:
            self._update(batch + 1, {}, "")

    def on_predict_end(self, logs: Any) -> None:
        """Take the bar away."""
        self._hide()

    # --- drawing ----------------------------------------------------------------------------------

    def _show(self, title: str, num_batches: int | None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._hide()
        self._start = time.perf_counter()
        self._next_redraw = 0.0
        self._num_batches = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.fields[total_text]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[values]}"),
            TextColumn("[dim]{task.fields[facts]}"),
            auto_refresh=False,
            transient=True,
        )
        self._progress.start()
        self._task = self._add(title, num_batches)

    def _add(self, title: str, num_batches: int | None) -> Any:
        text = "?" if num_batches is None else str(num_batches)
        return self._progress.add_task(
            title, total=num_batches, facts="", values="", total_text=text
        )

    def _redraw(self, logs: Any, facts: str) -> None:
        self._update(self._num_batches, logs, facts)

    def _update(self, completed: int, logs: Any, facts: str) -> None:
        # Reading the logs waits for the device: the price of a redraw, not of a batch.
        values = format_values(logs)
        self._progress.update(self._task, completed=completed, values=values, facts=facts)
        self._progress.refresh()
        self._next_redraw = time.perf_counter() + REDRAW_SECONDS

    def _facts(self) -> str:
        seconds = time.perf_counter() - self._start
        rate = self._num_batches * self.trainer.info.batch_size / max(seconds, 1e-9)
        parts = [f"{rate:,.0f} examples/s", format_bytes(active_bytes())]
        if (learning_rate := self.trainer.learning_rate) is not None:
            parts.insert(0, f"lr {learning_rate:.2e}")
        return " ".join(parts)

    def _hide(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    kernel = shell.get_ipython() if shell is not None else None
    return type(kernel).__name__ == "ZMQInteractiveShell"
