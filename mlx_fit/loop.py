"""One epoch runner, for training, evaluation and prediction alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import mlx.nn as nn

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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, each in its own mode again outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        _set_modes(modes)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The model in training mode inside, each module in its own mode again outside.

    A model whose root is in evaluation mode (mlx-lm loads them so) is put into training mode as a
    whole; otherwise modules that the user put into evaluation mode stay there.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module._set_training_mode(training)
