"""Optimizers for adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_fit.checks import number


def lora_plus(
    make: Callable[[Any], optim.Optimizer], learning_rate: Any, ratio: float = 16.0
) -> optim.MultiOptimizer:
    """An optimizer that gives the adapters' B a higher rate than A (LoRA+, arXiv 2402.12354).

    Args:
        make: makes an optimizer from a learning rate, as ``mlx.optimizers.AdamW`` does.
        learning_rate: of A and of whatever else trains: a number or a schedule.
        ratio: that of B over it.

    Raises:
        ConfigurationError: a number cannot work.

    Example:
        >>> import mlx.optimizers as optim
        >>> optimizer = lora_plus(optim.AdamW, 1e-4)
        >>> [round(part.learning_rate.item(), 6) for part in optimizer.optimizers]
        [0.0016, 0.0001]
    """
    ratio = number("ratio", ratio, above=0.0)
    if not callable(learning_rate) and not isinstance(learning_rate, mx.array):
        learning_rate = number("learning_rate", learning_rate, 0.0)
    raised: Any = ratio * learning_rate if not callable(learning_rate) else None
    if raised is None:

        def raised(step: mx.array) -> mx.array:
            return ratio * learning_rate(step)

    parts = [make(raised), make(learning_rate)]
    return optim.MultiOptimizer(parts, [lambda path, _: path.split(".")[-1] == "lora_b"])
