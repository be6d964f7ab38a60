"""One epoch runner, for training, evaluation and prediction alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, Protocol

from mlx_fit.logs import Logs, Sums
from mlx_fit.pace import Pace


class Step(Protocol):
    """What the runner needs of a step."""

    @property
    def sums(self) -> Sums:
        """What the pass has added up so far."""

    def __call__(self, batch: Any) -> None:
        """Take a batch."""

    def settle(self) -> None:
        """Have the device compute what the batch changed."""


class Display(Protocol):
    """Wants to be told of a batch from time to time only."""

    due_at: Any


Hook = Callable[[int, Any], None]


def run_batches(
    batches: Iterable[Any],
    step: Step,
    begin_hooks: list[Hook],
    end_hooks: list[Hook],
    is_over: Callable[[], bool],
    pace: Pace,
    displays: Sequence[tuple[Display, Hook]] = (),
    first: int = 0,
) -> None:
    """Take batches until they end or ``is_over()`` says so, and tell the hooks of each.

    Nothing here reads the device: logs stay there until a hook looks at them.

    Args:
        batches: what to take.
        step: what takes them.
        begin_hooks, end_hooks: called before and after each batch.
        is_over: asked after each batch.
        pace: is told of the wait for each batch.
        displays: called after the batches for which they are due.
        first: index of the first batch, in an epoch that goes on.
    """
    asked = perf_counter()
    for index, batch in enumerate(batches, first):
        pace.waited += perf_counter() - asked
        pace.num_batches += 1
        for hook in begin_hooks:
            hook(index, {})
        step(batch)
        step.settle()
        logs: Logs | None = None
        if end_hooks:
            logs = Logs(step.sums)
            for hook in end_hooks:
                hook(index, logs)
        for display, hook in displays:
            if perf_counter() >= display.due_at:
                hook(index, Logs(step.sums) if logs is None else logs)
        if is_over():
            break
        asked = perf_counter()
