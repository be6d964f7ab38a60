"""Which positions of a batch of tokens count, so that the head runs for these alone.

Prompts and padding need no logits. How many positions are kept is a constant of a compiled step, so
that it is rounded up to eighths of the batch: it depends on the batch alone, and a resumed run
rounds in the same way.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

PARTS = 8
BEHIND = 2**30  # the same for all shapes: MLX compiles a kernel for each constant


def capacity(weights: Any, shape: tuple[int, ...]) -> int | None:
    """How many positions to keep so that all that count are among them; None: all of them.

    Args:
        weights: on the host, of ``shape`` or of its first axis; None: all count.
        shape: (batch, length).
    """
    if weights is None or shape[0] * shape[1] < PARTS:
        return None
    counts = np.asarray(weights) > 0
    num_counted = int(counts.sum()) * (1 if counts.ndim == 2 else shape[1])
    size = shape[0] * shape[1]
    parts = -(-num_counted * PARTS // size)
    return None if parts >= PARTS else -(-size * max(parts, 1) // PARTS)


def positions(weights: mx.array, capacity: int) -> mx.array:
    """Indices of the ``capacity`` first positions: those that count in their order, then others.

    Args:
        weights: flat, shape (tokens,).
        capacity: from :func:`capacity`.
    """
    places = mx.arange(weights.size)
    return mx.argsort(mx.where(weights > 0, places, places + BEHIND))[:capacity]
