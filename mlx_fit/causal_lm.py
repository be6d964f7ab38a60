"""The objective of language models: predict the next token, each target weighing what it says.

Documents that share a row are kept apart by :func:`mlx_fit.text.apply_packed`. May import:
``objective``, ``head_apart``, ``text``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.batch import TextBatch
from mlx_fit.body_head import SplitModel, logits_of, num_embeddings
from mlx_fit.checks import natural, number
from mlx_fit.chunked_loss import TokenLoss, TokenSums, chunked_sums, whole_sums
from mlx_fit.counted import capacity, positions
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.head_apart import HeadApart
from mlx_fit.logs import divide, total
from mlx_fit.objective import Objective, Terms
from mlx_fit.sums import long_sum
from mlx_fit.text.packed_model import apply_packed, check_packing
from mlx_fit.weighting import host_sum, reciprocal

__all__ = ["CausalLM"]


class _Tokens(NamedTuple):
    """A batch taken apart; arrays of shape (batch, length), None where it has none."""

    tokens: Any
    targets: Any
    weights: Any
    segments: Any


class CausalLM(Objective):
    """Cross-entropy of a language model's next token, averaged over the tokens that count.

    A batch is a NamedTuple with the fields ``tokens``, ``targets``, ``weights`` and ``segments``
    (:mod:`mlx_fit.text` makes them), or a tuple ``(tokens, targets)`` or
    ``(tokens, targets, weights)``. Tokens and targets are integers of shape ``(batch, length)``,
    targets already shifted: ``targets[:, i]`` follows ``tokens[:, i]``. Weights have that shape,
    0 where a target does not count. The model maps tokens to logits of shape ``(batch, length,
    classes)``; where it returns a tuple they come first, in a dict they are called ``"logits"``.

    Logged: ``loss``, ``perplexity`` (of the likelihood alone), ``accuracy``, ``num_tokens`` (the
    targets that counted) and ``aux_loss`` where there is one.

    Args:
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1).
        z_loss: factor of ``logsumexp(logits)**2``, which keeps logits small (PaLM, arXiv
            2204.02311, section 5, uses 1e-4).
        chunk_size: tokens of the flattened batch whose logits are in memory at a time; None: all.
            In either case positions that do not count are left out, up to an eighth of the batch,
            where the head can be run apart from the body.
            The model must have its body apart from its head: ``model.model`` and what its
            ``__call__`` does with the result.
        aux_loss: ``f(model, outputs) -> scalar``, added to the mean loss of each batch, as for the
            load balancing of a router. ``outputs`` is what the model returned.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, numpy as np
        >>> from mlx_fit import Trainer
        >>> mx.random.seed(0)
        >>> model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
        >>> rows = np.array([[0, 1, 2, 3], [2, 3, 4, 0]])
        >>> trainer = Trainer(model, optim.Adam(0.1), objective=CausalLM(), seed=0)
        >>> history = trainer.fit([(rows[:, :-1], rows[:, 1:])], epochs=30, verbose=0)
        >>> trainer.evaluate([(rows[:, :-1], rows[:, 1:])], verbose=0)["accuracy"]
        1.0
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        chunk_size: int | None = None,
        aux_loss: Callable[[Any, Any], mx.array] | None = None,
    ) -> None:
        smoothing = number("label_smoothing", label_smoothing, 0.0, below=1.0)
        if aux_loss is not None and not callable(aux_loss):
            raise ConfigurationError(
                f"aux_loss={aux_loss!r}; expected a function f(model, outputs) -> scalar."
            )
        # Whether rows of the batch hold several documents; how many positions the head runs for.
        self.variant: tuple[bool, int | None] = False, None
        self.chunk_size = None if chunk_size is None else natural("chunk_size", chunk_size, 1)
        self._loss = TokenLoss(smoothing, number("z_loss", z_loss, 0.0))
        self._aux_loss = aux_loss
        self._num_classes: int | None = None
        self._num_embeddings: int | None = None
        self._apart = HeadApart(self.chunk_size)
        self._packed_shapes: set[tuple[int, ...]] = set()  # that packing was found to work for

    # --- on the device, while tracing -------------------------------------------------------------

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        tokens, targets, weights, segments = parts = _parts(batch)
        self._num_embeddings = num_embeddings(model)
        # Only what is compiled relies on what the host saw of the batch.
        packed, kept = self.variant if is_traced(tokens) else _variant(parts)
        weights = _token_weights(weights, targets.shape)
        flat_weights = weights.reshape(-1)
        # What does not count may hold any number, and must not index beyond the logits.
        flat_targets = mx.where(flat_weights > 0, targets.reshape(-1), 0).astype(mx.int32)
        split = self._split(model, tokens, segments if packed else None, kept)
        if isinstance(split, SplitModel):
            outputs = split.outputs
            sums = self._sums_of(split, tokens, flat_targets, flat_weights, kept)
        else:
            outputs = split
            logits = logits_of(outputs, tokens)
            self._num_classes = logits.shape[-1]
            flat = logits.reshape(-1, self._num_classes)
            sums = whole_sums(self._loss, flat, flat_targets, flat_weights, model.training)
        return self._terms(model, outputs, sums, flat_weights)

    def _split(
        self, model: nn.Module, tokens: mx.array, segments: mx.array | None, kept: int | None
    ) -> Any:
        if not is_traced(tokens):
            self._apart.look_at(model)
        return self._apart.run(model, tokens, kept, partial(_forward, tokens, segments))

    def _sums_of(
        self,
        split: SplitModel,
        tokens: mx.array,
        targets: mx.array,
        weights: mx.array,
        kept: int | None,
    ) -> TokenSums:
        """The sums over the positions that count, or over all, from the body's output."""
        self._num_classes = logits_of(split.outputs, tokens).shape[-1]
        hidden, tokens = split.hidden.reshape(-1, split.hidden.shape[-1]), tokens.reshape(-1)
        if kept is not None:
            places = positions(weights, kept)
            hidden, tokens, targets, weights = (
                array[places] for array in (hidden, tokens, targets, weights)
            )
        trains = split.model.training
        if self.chunk_size is None or self.chunk_size >= len(hidden):
            logits = split.head(hidden[None], tokens[None], split.parameters)
            flat = logits.reshape(-1, logits.shape[-1])
            return whole_sums(self._loss, flat, targets, weights, trains)
        return chunked_sums(
            self._loss,
            split.head,
            hidden,
            split.parameters,
            tokens,
            targets,
            weights,
            self.chunk_size,
            trains,
        )

    def _terms(self, model: nn.Module, outputs: Any, sums: TokenSums, weights: mx.array) -> Terms:
        weight = long_sum(weights)
        terms = Terms(sums.loss * reciprocal(weight), weight)
        if self._aux_loss is not None:
            aux = self._aux_loss(model, outputs)
            if not isinstance(aux, mx.array) or aux.size != 1:
                found = tuple(aux.shape) if isinstance(aux, mx.array) else type(aux).__name__
                raise ConfigurationError(f"aux_loss returned {found}; expected a scalar mx.array.")
            aux = aux.reshape(()).astype(mx.float32)
            terms.mean = terms.mean + aux
            terms.count("aux_loss", aux, weight)
        terms.count("loss", terms.mean, weight)
        terms.states["perplexity"] = {"sum": sums.nll, "weight": weight}
        terms.computes["perplexity"] = _perplexity
        terms.states["accuracy"] = {"sum": sums.correct, "weight": weight}
        terms.computes["accuracy"] = divide
        terms.states["num_tokens"] = {"sum": (weights > 0).sum()}
        terms.computes["num_tokens"] = total
        return terms

    # --- on the host ------------------------------------------------------------------------------

    def start(self, model: nn.Module) -> None:
        """The model may have another number of classes now, or another head."""
        self._num_classes = self._num_embeddings = None
        self._packed_shapes.clear()
        self._apart.forget()
        self._apart.look_at(model)

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Compare documents that share a row with their own runs, once for each batch shape."""
        parts = _parts(batch)
        shape = tuple(parts.tokens.shape)
        if self.variant[0] and shape not in self._packed_shapes:
            check_packing(model, TextBatch(*parts))
            self._packed_shapes.add(shape)

    def host_weight(self, batch: Any) -> float | None:
        """Check tokens and targets, and sum the weights of the targets."""
        parts = _parts(batch)
        tokens, targets, weights, _ = parts
        self.variant = _variant(parts)
        if self._apart.never:
            self.variant = self.variant[0], None
        if not isinstance(tokens, mx.array):
            _check_range("tokens", np.asarray(tokens), None, self._num_embeddings)
        weight = host_sum(weights)
        if weights is None:
            weight = float(targets.size)
        elif weight is not None and np.ndim(weights) == 1:
            weight *= targets.shape[1]
        if not isinstance(targets, mx.array):
            counts = None if weights is None or isinstance(weights, mx.array) else weights
            if not isinstance(weights, mx.array):
                _check_range("targets", np.asarray(targets), counts, self._num_classes)
        return weight

    @property
    def directions(self) -> dict[str, bool | None]:
        """Losses and perplexity are better lower, accuracy higher."""
        lower = dict.fromkeys(["loss", "perplexity", "aux_loss"], False)
        return {**lower, "accuracy": True, "num_tokens": None}


# --- batches --------------------------------------------------------------------------------------


def _parts(batch: Any) -> _Tokens:
    names: Any = getattr(batch, "_fields", None)
    if names is not None:
        if not {"tokens", "targets"} <= set(names):
            raise DataError(
                f"CausalLM got a {type(batch).__name__}({', '.join(names)}); expected the fields "
                "tokens, targets, weights and segments, or a tuple (tokens, targets, weights)."
            )
        parts = _Tokens(*[getattr(batch, name, None) for name in _Tokens._fields])
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        parts = _Tokens(*batch, *(None,) * (4 - len(batch)))
    else:
        found = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise DataError(
            f"CausalLM got a batch of {found}; expected a NamedTuple with the fields tokens, "
            "targets, weights and segments, or a tuple (tokens, targets[, weights])."
        )
    for name, part in zip(_Tokens._fields, parts, strict=True):
        if part is not None and not hasattr(part, "shape"):
            raise DataError(
                f"{name} are a {type(part).__name__}; expected an array of shape (batch, length), "
                "such as np.array(rows).",
                field=name,
            )
    for name in ("tokens", "targets"):
        array = getattr(parts, name)
        if array is None or len(array.shape) != 2 or not _is_integer(array):
            found = "None" if array is None else f"shape {tuple(array.shape)}, {array.dtype}"
            raise DataError(
                f"{name} have {found}; expected integers of shape (batch, length).", field=name
            )
    if _is_mask(parts.tokens, parts.targets):
        raise DataError(
            "targets are uint8 beside tokens of another dtype: they look like the mask of a "
            "TextDataset's rows (tokens, mask), not like the next tokens. Batch it with "
            "BucketBatches or PackedBatches of mlx_fit.text, which make targets and weights.",
            field="targets",
        )
    shape = tuple(parts.tokens.shape)
    for name in ("targets", "weights", "segments"):
        array = getattr(parts, name)
        allowed = (shape, shape[:1]) if name == "weights" else (shape,)
        if array is not None and tuple(array.shape) not in allowed:
            raise DataError(
                f"{name} have shape {tuple(array.shape)}, tokens {shape}; expected the same.",
                field=name,
            )
    return parts


def _is_mask(tokens: Any, targets: Any) -> bool:
    """Whether targets are bytes and tokens are not: the dtype of a :class:`TextDataset`'s masks."""
    return targets.dtype in (np.uint8, mx.uint8) and tokens.dtype not in (np.uint8, mx.uint8)


def _is_integer(array: Any) -> bool:
    if isinstance(array, mx.array):
        return mx.issubdtype(array.dtype, mx.integer)
    return np.asarray(array).dtype.kind in "iu"


def _token_weights(weights: mx.array | None, shape: tuple[int, ...]) -> mx.array:
    """A float32 weight a token; a weight a row stands for all tokens of the row."""
    if weights is None:
        return mx.ones(shape)
    weights = weights.astype(mx.float32)
    return mx.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, shape)


def _variant(batch: _Tokens) -> tuple[bool, int | None]:
    """Whether rows hold several documents, and how many positions the head has to run for."""
    segments, weights = batch.segments, batch.weights
    packed = segments is not None and _is_packed(segments, weights)
    on_device = isinstance(weights, mx.array) and is_traced(weights)
    return packed, None if on_device else capacity(weights, tuple(batch.tokens.shape))


def _is_packed(segments: Any, weights: Any) -> bool:
    """Whether a row holds several documents: its segments change before its last target.

    Padding behind the last target may have a number of its own: it looks back at the document, and
    nothing looks at it.
    """
    segments = np.asarray(segments)
    if segments.shape[1] < 2:
        return False
    changes = segments[:, 1:] != segments[:, :-1]
    if not changes.any() or weights is None or np.ndim(weights) != 2:
        return bool(changes.any())
    counts = np.asarray(weights) > 0
    before_last = np.cumsum(counts[:, ::-1], 1)[:, ::-1] > 0
    return bool((changes & before_last[:, 1:]).any())


def _check_range(name: str, values: np.ndarray, weights: Any, limit: int | None) -> None:
    """Raise for an integer that would index beyond the embedding or the logits."""
    if not values.size or (values.min() >= 0 and (limit is None or values.max() < limit)):
        return
    wrong = (values < 0) | (values >= (math.inf if limit is None else limit))
    if weights is not None:
        weights = np.asarray(weights)
        wrong &= (weights[:, None] if weights.ndim == 1 else weights) > 0
    if not wrong.any():
        return
    row, column = (int(i) for i in np.argwhere(wrong)[0])
    allowed = "at least 0" if limit is None else f"0 to {limit - 1}"
    ignore = " Set its weight to 0 if it should not count." if name == "targets" else ""
    raise DataError(
        f"{name}[{row}, {column}] is {values[row, column]}; expected {allowed}.{ignore}",
        field=name,
        index=row,
    )


# --- models ---------------------------------------------------------------------------------------


def _forward(tokens: mx.array, segments: mx.array | None, model: Any) -> Any:
    return model(tokens) if segments is None else apply_packed(model, tokens, segments)


def is_traced(array: mx.array) -> bool:
    """Whether ``array`` is a placeholder of a compiled function, which has no value."""
    try:
        mx.eval(array)
    except (RuntimeError, ValueError):
        return True
    return False


def _perplexity(state: Mapping[str, np.ndarray]) -> float | None:
    """``exp`` of the mean negative log-likelihood over all that was added up."""
    mean = divide({**state})
    if mean is None:
        return None
    return math.exp(mean) if mean < 700 else math.inf
