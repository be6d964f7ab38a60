"""An n-gram model with Witten-Bell smoothing: what a language model has to beat."""

from __future__ import annotations

import numpy as np


def perplexity(train: np.ndarray, test: np.ndarray, vocabulary: int, order: int = 5) -> float:
    """Perplexity of an interpolated n-gram model on ``test``.

    p(w | c) = (count(c w) + T(c) p(w | c')) / (count(c) + T(c)), where T(c) is how many different
    tokens follow the context c, and c' is c without its first token (Witten and Bell, 1991, method
    C). Below the unigrams lies the uniform distribution.

    Args:
        train, test: token ids, shape ``(tokens,)``.
        vocabulary: number of different ids.
        order: tokens of a context and the next one together.
    """
    probability = np.full(len(test), 1 / vocabulary)
    for length in range(order):
        followed = _grams(train, length + 1, vocabulary)  # context and next token, packed
        grams, counts = np.unique(followed, return_counts=True)
        contexts, starts = np.unique(grams // vocabulary, return_index=True)
        totals = np.add.reduceat(counts, starts)
        kinds = np.diff(np.append(starts, len(grams)))
        asked = _grams(test, length + 1, vocabulary)
        count = _look_up(grams, counts, asked)
        total = _look_up(contexts, totals, asked // vocabulary)
        kind = _look_up(contexts, kinds, asked // vocabulary)
        is_known = total > 0  # otherwise the shorter context has the word
        # The first tokens have shorter contexts only.
        shorter = probability[length:]
        longer = (count + kind * shorter) / np.maximum(total + kind, 1)
        probability[length:] = np.where(is_known, longer, shorter)
    return float(np.exp(-np.log(probability).mean()))


def _grams(tokens: np.ndarray, length: int, vocabulary: int) -> np.ndarray:
    """Every run of ``length`` tokens as one number, the last token in the lowest digit."""
    packed = np.zeros(len(tokens) - length + 1, np.uint64)
    for start in range(length):
        packed = packed * np.uint64(vocabulary) + tokens[start : start + len(packed)]
    return packed


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
