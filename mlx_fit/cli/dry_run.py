"""What a batch looks like to the model: its text, with what is learned of it marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from mlx_fit.batch import TextBatch

ROWS, TOKENS = 4, 400  # that are shown
TARGET = "bold green"


def print_batch(batch: TextBatch, tokenizer: Any, kinds: tuple[str, ...] = ("",)) -> None:
    """Print the first rows of a batch: targets in colour, or in >> << where there is none.

    Args:
        batch: the batch.
        tokenizer: makes text of it.
        kinds: what the rows are, in turn.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    has_colour = console.color_system is not None
    tokens, targets = np.asarray(batch.tokens), is_target(batch)
    rows, width = tokens.shape
    marks = "in green" if has_colour else "between >> and <<"
    console.print(f"The first batch: {rows} rows of {width} tokens; targets {marks}.")
    for row in range(min(rows, ROWS)):
        length = int(np.count_nonzero(np.asarray(batch.segments)[row]))
        text = Text(f"{row // len(kinds) + 1}. {kinds[row % len(kinds)]}")
        for learned, piece in pieces(tokens[row, :length], targets[row, :length], tokenizer):
            if not has_colour and learned:
                piece = f">>{piece}<<"
            text.append(piece, TARGET if learned else "dim")
        if length > TOKENS:
            text.append(f" ... ({length - TOKENS} more tokens)")
        console.print(text, soft_wrap=True)
    if rows > ROWS:
        console.print(f"... and {rows - ROWS} more rows")


def is_target(batch: TextBatch) -> np.ndarray:
    """Which tokens of a batch are learned, bool of shape (batch, length)."""
    weights = np.asarray(batch.weights) > 0
    shifted = np.zeros_like(weights)
    shifted[:, 1:] = weights[:, :-1]
    return shifted


def pieces(tokens: np.ndarray, learned: np.ndarray, tokenizer: Any) -> Iterator[tuple[bool, str]]:
    """Runs of tokens that are learned, or not, as text."""
    pairs = list(zip(tokens.tolist(), learned.tolist(), strict=True))[:TOKENS]
    for is_learned, run in groupby(pairs, key=lambda pair: pair[1]):
        yield is_learned, tokenizer.decode([token for token, _ in run])
