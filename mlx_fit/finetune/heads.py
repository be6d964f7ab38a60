"""Heads on the body of a language model: classes or vectors of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.body_head import body_path
from mlx_fit.checks import boolean, natural, number
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.finetune.blocks import is_embedding, ordered_modules

POOLING = ("mean", "last")


class SequenceClassifier(nn.Module):
    """The body of a language model and a linear layer that gives classes of a whole sequence.

    The body is shared with ``model``, with its adapters and with what is frozen of it; the new
    layer trains. ``Trainer(classifier, optimizer, loss="cross_entropy")`` takes batches
    ``({"tokens": ..., "mask": ...}, labels)``, as :func:`pad_tokens` makes the first.

    Args:
        model: a language model whose body maps tokens to hidden states, as ``model.model`` of
            mlx-lm's models does; or such a body itself.
        num_classes: width of the output.
        pooling: which hidden state counts: ``"last"``, that of the last token, or the ``"mean"``.

    Raises:
        ConfigurationError: an argument cannot work, or the model has no embedding.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> classifier = SequenceClassifier(nn.Sequential(nn.Embedding(9, 4)), num_classes=2)
        >>> classifier(**pad_tokens([[1, 2, 3], [4]])).shape
        (2, 2)
    """

    def __init__(self, model: nn.Module, num_classes: int, pooling: str = "last") -> None:
        super().__init__()
        natural("num_classes", num_classes, 1)
        self.body = body_of(model)
        self.head = nn.Linear(_dims(model), num_classes)
        self.head.weight = self.head.weight * 0.1  # near even odds at first
        self.pooling = _checked_pooling(pooling)

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        """Logits of shape ``(batch, classes)``, float32.

        Args:
            tokens: int32 of shape ``(batch, length)``, padded on the right.
            mask: of that shape, 1 at tokens, 0 at padding; None: there is none.
        """
        return self.head(pool(self.body(_array(tokens)), mask, self.pooling))


class Embedder(nn.Module):
    """The body of a language model, pooled to one vector a sequence.

    Args:
        model: as for :class:`SequenceClassifier`.
        pooling: ``"mean"`` of all hidden states, or that of the ``"last"`` token.
        normalize: whether vectors have length 1.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> embedder = Embedder(nn.Sequential(nn.Embedding(9, 4)))
        >>> vectors = embedder(**pad_tokens([[1, 2, 3], [4]]))
        >>> vectors.shape, mx.linalg.norm(vectors, axis=1).round(3).tolist()
        ((2, 4), [1.0, 1.0])
    """

    def __init__(self, model: nn.Module, pooling: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        self.body = body_of(model)
        self.pooling = _checked_pooling(pooling)
        self.normalize = boolean("normalize", normalize)

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        """Vectors of shape ``(batch, dims)``, float32; arguments as for a classifier."""
        vectors = pool(self.body(_array(tokens)), mask, self.pooling)
        if not self.normalize:
            return vectors
        # As torch.nn.functional.normalize: a vector of zeros stays one.
        return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class InfoNCE:
    """The objective of an :class:`Embedder`: each text finds its partner among those of the batch.

    A batch is ``(first, second)``, two dicts of ``tokens`` and ``mask`` with a pair a row. The loss
    is the mean of both directions' cross-entropies of ``a @ b.T / temperature`` (van den Oord et
    al. 2018, arXiv 1807.03748, equation 4; symmetric as in CLIP, arXiv 2103.00020, figure 3). The
    other rows of a batch are the negatives, so that gradient accumulation is no larger batch.

    Logged: ``loss``, ``accuracy`` (first to second).

    Args:
        temperature: divides the similarities.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        self.temperature = number("temperature", temperature, 0.0)
        if self.temperature == 0:
            raise ConfigurationError("temperature=0; expected a positive number.")

    def __call__(self, model: nn.Module, batch: Any) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss of a batch, and its accuracy."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(
                "InfoNCE needs batches (first, second), each {'tokens': ..., 'mask': ...}, as "
                "pad_tokens makes them."
            )
        first, second = (model(**side) for side in batch)
        logits = first.astype(mx.float32) @ second.astype(mx.float32).T / self.temperature
        own = mx.arange(len(logits))
        losses = [nn.losses.cross_entropy(each, own).mean() for each in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2, {"accuracy": (logits.argmax(-1) == own).mean()}


def pad_tokens(rows: Sequence[Sequence[int]], length: int | None = None) -> dict[str, np.ndarray]:
    """Lists of tokens as arrays: ``tokens``, int32, and ``mask``, float32, both (rows, length).

    Args:
        rows: token ids, one list a text; none may be empty.
        length: width of the arrays; longer rows are cut. None: the longest row's.

    Raises:
        DataError: there are no rows, or an empty one.
    """
    sizes = [len(row) for row in rows]
    if not sizes or min(sizes) == 0:
        where = f"row {sizes.index(0)} is empty" if sizes else "there are no rows"
        raise DataError(f"pad_tokens: {where}; expected lists of token ids.")
    width = max(sizes) if length is None else natural("length", length, 1)
    tokens = np.zeros((len(sizes), width), np.int32)
    mask = np.zeros((len(sizes), width), np.float32)
    for index, row in enumerate(rows):
        kept = np.asarray(row)[:width]
        if kept.dtype.kind not in "iu":
            raise DataError(f"pad_tokens: row {index} holds {kept.dtype}; expected integers.")
        tokens[index, : len(kept)], mask[index, : len(kept)] = kept, 1
    return {"tokens": tokens, "mask": mask}


def pool(hidden: mx.array, mask: mx.array | None, pooling: str) -> mx.array:
    """One vector a sequence, float32, of hidden states of shape (batch, length, dims)."""
    if not isinstance(hidden, mx.array) or hidden.ndim != 3:
        found = hidden.shape if isinstance(hidden, mx.array) else type(hidden).__name__
        raise ConfigurationError(
            f"The model's body returned {found}; expected hidden states of shape (batch, length, "
            "dims). Give the part of the model that ends before its output projection."
        )
    hidden = hidden.astype(mx.float32)
    if mask is None:
        return hidden[:, -1] if pooling == "last" else hidden.mean(1)
    mask = _array(mask).astype(mx.float32)
    if pooling == "last":
        last = mx.maximum(mask.sum(1) - 1, 0).astype(mx.int32)
        return mx.take_along_axis(hidden, last[:, None, None], axis=1).squeeze(1)
    return (hidden * mask[..., None]).sum(1) / mx.maximum(mask.sum(1), 1)[:, None]


def body_of(model: nn.Module) -> nn.Module:
    """The part of a model that ends before its output projection."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}; expected an mlx.nn.Module.")
    try:
        path = body_path(model)
    except ConfigurationError:
        return model  # a body by itself
    body: Any = model
    for key in path:
        body = body[key]
    return body


def _array(values: Any) -> mx.array:
    """What a trainer passes is on the device already; a user's call may pass NumPy arrays."""
    return values if isinstance(values, mx.array) else mx.array(values)


def _dims(model: nn.Module) -> int:
    """Width of the hidden states: that of the token embedding."""
    for _, module in ordered_modules(body_of(model)):
        if is_embedding(module):
            width = module.weight.shape[-1]
            return width * 32 // module.bits if "scales" in module else width
    raise ConfigurationError(
        f"{type(model).__name__} has no embedding, whose width tells that of the hidden states."
    )


def _checked_pooling(pooling: Any) -> str:
    if pooling not in POOLING:
        raise ConfigurationError(f"pooling={pooling!r}; expected 'mean' or 'last'.")
    return pooling
