"""Models on packed rows: how documents are kept apart, and whether that works."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.batch import TextBatch
from mlx_fit.errors import ConfigurationError
from mlx_fit.modes import evaluation_mode

__all__ = ["SegmentCache", "apply_packed", "check_packing", "is_packed"]

_INSTEAD = "Use BucketBatches, which works with every model."


class SegmentCache:
    """Stands in for mlx-lm's key-value cache, and keeps nothing but who may see whom.

    mlx-lm's models ask their cache for the attention mask, so one that answers with a block mask
    keeps documents apart without a change to the model. Positions go on from document to document:
    rotary embeddings depend on differences alone.

    Args:
        segments: int32 of shape ``(batch, length)``: the number of the document, 0 at padding.

    Attributes:
        offset: 0, the position of the first token.
    """

    def __init__(self, segments: mx.array) -> None:
        self.offset = 0
        self._segments = segments
        self._masks: dict[int | None, mx.array] = {}

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        """Bool of shape ``(batch, 1, length, length)``: a token sees those before it, and itself,
        in its own document, and at most ``window_size`` of them."""
        if window_size not in self._masks:
            position = mx.arange(length)
            seen = position[:, None] >= position[None]
            if window_size is not None:
                seen &= position[:, None] < position[None] + window_size
            same = self._segments[:, :, None] == self._segments[:, None, :]
            self._masks[window_size] = (same & seen)[:, None]
        return self._masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values as they are: there are no earlier ones."""
        return keys, values


def is_packed(batch: TextBatch) -> bool:
    """Whether a row of the batch holds several documents, so that a model must keep them apart.

    Reads ``segments``: meant for batches that are still on the host.
    """
    return bool((np.asarray(batch.segments) > 1).any())


def apply_packed(model: nn.Module, tokens: mx.array, segments: mx.array) -> Any:
    """``model(tokens)`` where each token sees its own document only.

    A model that has an argument ``segments`` gets it. One that has ``cache``, as those of mlx-lm
    have, gets a :class:`SegmentCache` for each layer.

    Args:
        model: a language model.
        tokens: int32 of shape ``(batch, length)``.
        segments: int32 of the same shape, from :class:`~mlx_fit.text.PackedBatches`.

    Returns:
        What the model returns, usually logits of shape ``(batch, length, vocabulary)``.

    Raises:
        ConfigurationError: the model takes neither, or it has a state that runs through the row.
    """
    arguments = _arguments(model)
    if "segments" in arguments:
        return model(tokens, segments=segments)
    if "cache" not in arguments:
        raise ConfigurationError(
            f"{_name(model)} cannot be trained on packed rows: its __call__ has neither an "
            f"argument 'segments' nor mlx-lm's 'cache'. {_INSTEAD} Or let the model take segments "
            "of shape (batch, length) and mask its attention with them."
        )
    return model(tokens, cache=[SegmentCache(segments)] * _num_caches(model))


def _arguments(model: nn.Module) -> set[str]:
    """Names of the arguments that the model's ``__call__``, or one that it overrides, takes."""
    calls = [vars(kind)["__call__"] for kind in type(model).__mro__ if "__call__" in vars(kind)]
    return {name for call in calls for name in inspect.signature(call).parameters}


def _num_caches(model: Any) -> int:
    """Key-value caches that the model wants, one for each layer."""
    if callable(getattr(model, "make_cache", None)):
        caches = model.make_cache()
        # What is no key-value cache holds a state that is carried from token to token.
        if others := sorted(
            {type(c).__name__ for c in caches if not hasattr(c, "update_and_fetch")}
        ):
            raise ConfigurationError(
                f"{_name(model)} cannot be trained on packed rows: it has a recurrent "
                f"state ({', '.join(others)}), which runs from one document into the next. "
                f"{_INSTEAD}"
            )
        return len(caches)
    layers = getattr(model, "layers", None)
    if layers is None:
        raise ConfigurationError(
            f"{_name(model)} cannot be trained on packed rows: it takes a cache, but has "
            f"neither make_cache() nor layers. {_INSTEAD}"
        )
    return len(layers)


def check_packing(model: nn.Module, batch: TextBatch, tolerance: float = 1e-4) -> float:
    """Compare a packed batch with each document's own run, before a model is trained on such.

    Models may take a mask and still be wrong: learned positions go on from document to document,
    and some broadcast a mask by row as if it were one by head. So give a batch of
    :class:`~mlx_fit.text.PackedBatches` of the size that training uses.

    Args:
        model: a language model that returns logits. It is run in evaluation mode, each module
            being in its own mode again afterwards.
        batch: NumPy or MLX arrays of shape ``(batch, length)``.
        tolerance: the largest difference of logits that is allowed. In half precision rounding
            alone differs more, so 8 units in the last place of the largest logit are allowed there.

    Returns:
        The largest difference.

    Raises:
        ConfigurationError: packing does not work with this model.
    """
    tokens, numbers = mx.array(batch.tokens), _several(np.array(batch.segments))
    name = _name(model)
    with evaluation_mode(model):
        try:
            together = _logits(apply_packed(model, tokens, mx.array(numbers)))
            mx.eval(together)
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"{name} cannot be trained on packed rows: it failed with a block mask for "
                f"{tokens.shape[0]} rows: {error} {_INSTEAD}"
            ) from error
        worst, where, largest = _differences(model, tokens, numbers, together)
    if together.dtype in (mx.float16, mx.bfloat16):
        tolerance = max(tolerance, 8 * mx.finfo(together.dtype).eps * largest)
    if not worst <= tolerance:  # NaN is no agreement
        row, document = where
        raise ConfigurationError(
            f"{name} cannot be trained on packed rows: the logits of document {document} in row "
            f"{row} differ by {worst:.2g} from those of its own run (allowed: {tolerance:.2g}). "
            f"Learned positions, or a mask that is used otherwise, do that. {_INSTEAD}"
        )
    return worst


def _several(segments: np.ndarray) -> np.ndarray:
    """The segments with rows of a single document divided in two, so that there is something to
    keep apart in every row."""
    divided = segments.copy()
    for row in divided:
        row[np.count_nonzero(row) // 2 : np.count_nonzero(row)] += row.max(initial=0) == 1
    return divided


def _name(model: Any) -> str:
    """What a user calls the model: mlx-lm's classes are all called Model."""
    return str(getattr(model, "model_type", type(model).__name__))


def _differences(
    model: nn.Module, tokens: mx.array, segments: np.ndarray, together: mx.array
) -> tuple[float, tuple[int, int], float]:
    """The largest difference, its (row, document), and the largest logit."""
    worst, where, largest = 0.0, (0, 0), 0.0
    for row in range(segments.shape[0]):
        for document in range(1, int(segments[row].max(initial=0)) + 1):
            start, stop = np.flatnonzero(segments[row] == document)[[0, -1]].tolist()
            alone = _logits(model(tokens[row : row + 1, start : stop + 1]))[0].astype(mx.float32)
            packed = together[row, start : stop + 1].astype(mx.float32)
            # Host synchronisation: the check runs once, before training.
            difference = float(mx.abs(packed - alone).max())
            largest = max(largest, float(mx.abs(alone).max()))
            if not difference <= worst:
                worst, where = difference, (row, document)
                if difference != difference:
                    return worst, where, largest
    return worst, where, largest


def _logits(outputs: Any) -> mx.array:
    if isinstance(outputs, mx.array):
        return outputs
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], mx.array):
        return outputs[0]
    raise ConfigurationError(
        f"The model returned a {type(outputs).__name__}; expected logits of shape "
        "(batch, length, vocabulary)."
    )
