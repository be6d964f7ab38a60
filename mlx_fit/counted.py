"""Which positions of a batch of tokens count, so that the head runs for these alone.

Prompts and padding need no logits. How many positions are kept is a constant of a compiled step, so
that it is rounded up to one of five shares of the batch: it depends on the batch alone, and a
resumed run rounds in the same way. Each share that occurs is a trace. On 2,000 rows of 16 shapes
(prompts of 40 tokens, answers of 120, batches of 4) a batch has 0.73 targets a position, and the
traces and the positions of the head are: all eighths 55 and 0.80, these shares 36 and 0.86, powers
of two 24 and 0.97. With prompts of 300 tokens and answers of 60: 0.18; 49 and 0.24, 44 and 0.27,
44 and 0.27.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

PARTS = 8
KEPT = (1, 2, 4, 6)  # of the parts; from there on all
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
    enough = next((share for share in KEPT if share >= parts), None)
    return None if enough is None else -(-size * enough // PARTS)


def positions(weights: mx.array, capacity: int) -> mx.array:
    """Indices of the ``capacity`` first positions: those that count in their order, then others.

    Args:
        weights: flat, shape (tokens,).
        capacity: from :func:`capacity`.
    """
    places = mx.arange(weights.size)
    return mx.argsort(mx.where(weights > 0, places, places + BEHIND))[:capacity]
