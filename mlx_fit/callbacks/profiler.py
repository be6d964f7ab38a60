"""Where the time of a fit goes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_fit.callbacks.as_json import dumps
from mlx_fit.callbacks.base import Callback, HookWatcher
from mlx_fit.callbacks.model_checkpoint import ModelCheckpoint
from mlx_fit.checks import boolean, file_of, natural
from mlx_fit.errors import ConfigurationError

PHASES = ("data wait", "step", "evaluation", "checkpoints", "callbacks", "other")
# What goes on once a hook has been called; others change nothing.
NEXT = {
    "on_train_begin": "other",
    "on_epoch_begin": "data wait",
    "on_train_batch_begin": "step",
    "on_train_batch_end": "data wait",
    "on_test_begin": "evaluation",
    "on_save_begin": "checkpoints",
    "on_epoch_end": "other",
}

CLOSED_BY = {"data wait": "on_train_batch_begin", "step": "on_train_batch_end"}


class Profiler(HookWatcher):
    """Measures a fit by phase, prints a table at its end, and writes a trace for Chrome.

    The phases: ``data wait`` (from the end of a batch to the next), ``step``, ``evaluation``,
    ``checkpoints`` (those of ``checkpoint_dir``, and the hooks of :class:`ModelCheckpoint`),
    ``callbacks`` (the hooks of all others, each also by itself) and ``other``. They add up to the
    whole time of the fit. On a GPU steps run behind: ``step`` is then how long the host was busy
    with them or waited. The first step of each shape contains its compilation; it stands in the
    column ``max ms``.

    Args:
        trace: path of a JSON file in Chrome's trace format, for ``chrome://tracing`` or Perfetto;
            None writes none.
        prints: whether the table is printed when ``fit`` ends.
        max_events: events kept for the trace; later ones are only counted.

    Attributes:
        seconds: phase -> seconds.
        counts: phase -> how often it was entered.
        hooks: ``"<callback>.<hook>"`` -> seconds.

    Example:
        >>> profiler = Profiler(trace="runs/trace.json")
        >>> # trainer.fit(train, callbacks=[profiler, ...]); print(profiler.table())
    """

    first_rank_only = True

    def __init__(
        self, trace: str | Path | None = None, prints: bool = True, max_events: int = 100_000
    ) -> None:
        self.path = None if trace is None else file_of("Profiler: trace", trace)
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.hooks: dict[str, float] = {}
        self._longest: dict[str, float] = {}
        self._prints = boolean("Profiler: prints", prints)
        self._max_events = natural("Profiler: max_events", max_events)
        self._events: list[tuple[str, str, float, float]] = []
        self._is_running = self._is_inside = False
        self._phase = "other"
        self._before = "other"  # what an evaluation or a save interrupted
        self._start = self._mark = 0.0

    # --- measuring --------------------------------------------------------------------------------

    def watched(
        self, owner: Callback, hook: str, method: Callable[..., None]
    ) -> Callable[..., None]:
        """Measure a hook, and the phase that ends where it is called."""
        phase = "checkpoints" if isinstance(owner, ModelCheckpoint) else "callbacks"
        name = f"{type(owner).__name__}.{hook}"

        def timed(*arguments: Any) -> None:
            if not self._is_running or self._is_inside:  # a callback that saves tells all others
                return method(*arguments)
            start = time.perf_counter()
            # Only a wait that a batch ends was for data; the last of an epoch was not.
            is_whole = CLOSED_BY.get(self._phase, hook) == hook
            ended = self._phase if is_whole else "other"
            self._add(ended, ended, self._mark, start)
            if hook in ("on_test_begin", "on_save_begin") and self._phase != NEXT[hook]:
                self._before = self._phase
            self._is_inside = True
            try:
                method(*arguments)
            finally:
                self._is_inside = False
                self._mark = time.perf_counter()
                if owner is not self:
                    self._add(phase, name, start, self._mark)
                    self.hooks[name] = self.hooks.get(name, 0.0) + self._mark - start
                is_back = hook in ("on_test_end", "on_save_end")
                self._phase = self._before if is_back else NEXT.get(hook, self._phase)

        return timed

    def _add(self, phase: str, name: str, start: float, end: float) -> None:
        seconds = end - start
        self.seconds[phase] += seconds
        if seconds > 1e-6:
            self.counts[phase] += 1
            self._longest[phase] = max(self._longest[phase], seconds)
            if self.path is not None and len(self._events) < self._max_events:
                self._events.append((name, phase, start, seconds))

    def on_train_begin(self, logs: Any) -> None:
        """Start the clock."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.counts = dict.fromkeys(PHASES, 0)
        self._longest = dict.fromkeys(PHASES, 0.0)
        self.hooks = {}
        self._events.clear()
        self._phase = self._before = "other"
        self._start = self._mark = time.perf_counter()
        self._is_running = True

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """A mark for :meth:`watched`, as all hooks below: there may be no other callback."""

    def on_train_batch_begin(self, batch: int, logs: Any) -> None:
        """The data is here."""

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """The step is over."""

    def on_test_begin(self, logs: Any) -> None:
        """An evaluation begins."""

    def on_test_end(self, logs: Any) -> None:
        """The evaluation is over."""

    def on_save_begin(self, logs: Any) -> None:
        """A checkpoint is written."""

    def on_save_end(self, logs: Any) -> None:
        """Training goes on."""

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """The epoch is over."""

    def on_train_end(self, logs: Any) -> None:
        """Print the table and write the trace."""
        self._finish()
        if self._prints:
            print(self.table())

    def on_exception(self, error: BaseException) -> None:
        """Write the trace of what there was."""
        self._finish()

    # --- telling ----------------------------------------------------------------------------------

    def _finish(self) -> None:
        if not self._is_running:
            return
        self._is_running = False
        if self.path is not None:
            try:
                self._write_trace(self.path)
            except OSError as error:  # no reason to lose what was trained
                warnings.warn(f"Profiler could not write its trace: {error}", stacklevel=2)

    def table(self) -> str:
        """Phases and the slowest hooks, as lines of text.

        Raises:
            ConfigurationError: nothing was measured yet.
        """
        if not self.seconds:
            raise ConfigurationError("Profiler.table(): nothing was measured yet; fit first.")
        total = max(sum(self.seconds.values()), 1e-12)
        lines = [
            f"{'phase':<34}{'count':>8}{'seconds':>10}{'share':>8}{'mean ms':>10}{'max ms':>10}"
        ]
        for phase in PHASES:
            seconds, count = self.seconds[phase], self.counts[phase]
            mean = 1e3 * seconds / max(count, 1)
            lines.append(
                f"{phase:<34}{count:>8}{seconds:>10.3f}{100 * seconds / total:>7.1f}%{mean:>10.3f}"
                f"{1e3 * self._longest[phase]:>10.3f}"
            )
        slowest = sorted(self.hooks.items(), key=lambda item: -item[1])
        for name, seconds in slowest[:5]:
            lines.append(f"  {name[:40]:<40}{'':>2}{seconds:>10.3f}{100 * seconds / total:>7.1f}%")
        lines.append(f"{'total':<42}{total:>10.3f}{100:>7.1f}%")
        return "\n".join(lines)

    def _write_trace(self, path: Path) -> None:
        """Complete events ("ph": "X"), times in microseconds since the fit began."""
        events = [
            {
                "name": name,
                "cat": phase,
                "ph": "X",
                "ts": 1e6 * (start - self._start),
                "dur": 1e6 * seconds,
                "pid": 1,
                "tid": 1,
            }
            for name, phase, start, seconds in self._events
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
