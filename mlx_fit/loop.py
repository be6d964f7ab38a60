"""One epoch runner, for training, evaluation and prediction alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from mlx_fit.logs import Logs, Sums


class Step(Protocol):
    """What the runner needs of a step."""

    sums: Sums

    def __call__(self, batch: Any) -> None:
        """Take a batch."""

    def settle(self) -> None:
        """Have the device compute what the batch changed."""


Hook = Callable[[int, Any], None]


def run_batches(
    batches: Iterable[Any],
    step: Step,
    begin_hooks: list[Hook],
    end_hooks: list[Hook],
    is_over: Callable[[], bool],
) -> int:
    """Take batches until they end or ``is_over()`` says so, and tell the hooks of each.

    Nothing here reads the device: logs stay there until a hook looks at them.

    Returns:
        How many batches were taken.
    """
    count = 0
    for index, batch in enumerate(batches):
        for hook in begin_hooks:
            hook(index, {})
        step(batch)
        step.settle()
        count += 1
        if end_hooks:
            logs = Logs(step.sums)
            for hook in end_hooks:
                hook(index, logs)
        if is_over():
            break
    return count
