"""A language model's head apart from its body, by running the model with the body's output given.

So whatever a model does with the output of its body (scaled or capped logits, a tied embedding)
is its own code, and nothing about it is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays
from mlx_fit.errors import ConfigurationError

BODIES = ("model", "transformer", "backbone", "language_model", "body")
TOLERANCE = 1e-2  # of the largest logit: half precision rounds by 0.4 %, TF32 by 0.1 %
LENGTH = 4  # of the row that is tried


def body_path(model: nn.Module) -> list[str]:
    """Attribute names that lead to the body: the innermost child of a usual name.

    Raises:
        ConfigurationError: there is none; lists the model's children.
    """
    path: list[str] = []
    module: Any = model
    while name := next((n for n in BODIES if isinstance(module.get(n), nn.Module)), None):
        path.append(name)
        module = module[name]
    if not path:
        raise ConfigurationError(
            f"chunk_size needs a model with its body apart from its head, as {type(model).__name__}"
            f".{BODIES[0]}; its children are {', '.join(model.children()) or 'none'}. Name the "
            f"body one of {', '.join(BODIES)}, or leave chunk_size out."
        )
    return path


class SplitModel:
    """One forward pass of a model whose body's output was kept.

    Args:
        model: the model; its body is found by name.
        forward: runs it: ``forward(model)`` gives what the model returns.
        logits_of: takes the logits out of what the model returns.

    Attributes:
        model: the model.
        outputs: what the model returned. Lazy: its logits cost nothing while nobody evaluates them.
        hidden: the body's output, shape (batch, length, dims).
        names: dotted names of the head's trainable parameters.
        parameters: these arrays.

    Raises:
        ConfigurationError: the model has no body, or does not call it once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: mx.array,
        forward: Callable[[Any], Any],
        logits_of: Callable[[Any], mx.array],
    ) -> None:
        self.model = model
        self._logits_of = logits_of
        *path, self._key = body_path(model)
        self._parent: Any = model
        for name in path:
            self._parent = self._parent[name]
        self._body = self._parent[self._key]
        self._prefix = ".".join([*path, self._key])
        listener = _Listener(self._body)
        with self._replaced(listener):
            self.outputs = forward(model)
        self.hidden = self._checked(listener.results, tokens)
        self._result = listener.results[0]
        self.names: list[str] = []
        trainable = dict(named_arrays(model.trainable_parameters()))
        stand_in = self._stand_in(self.hidden[:1, :1])
        with self._replaced(stand_in):
            model(tokens[:1, :1])
        own = tuple(f"{self._prefix}.{name}." for name in stand_in.used)
        for name in trainable:
            if not name.startswith(f"{self._prefix}.") or f"{name}.".startswith(own):
                self.names.append(name)
        self.parameters = [trainable[name] for name in self.names]

    def head(self, hidden: mx.array, tokens: mx.array, parameters: Sequence[mx.array]) -> mx.array:
        """The logits of hidden states of shape (1, length, dims), with these head parameters."""
        assign(self.model, zip(self.names, parameters, strict=True))
        try:
            with self._replaced(self._stand_in(hidden)):
                logits = self._logits_of(self.model(tokens))
        finally:
            assign(self.model, zip(self.names, self.parameters, strict=True))
        if logits.shape[:-1] != hidden.shape[:-1]:
            raise ConfigurationError(
                f"chunk_size needs a head that maps each position by itself: of {hidden.shape} it "
                f"made {logits.shape}. Leave chunk_size out."
            )
        return logits

    def check(self, tokens: mx.array) -> None:
        """Compare the head's logits of the first row with the model's own.

        Raises:
            ConfigurationError: they differ, as those of a head that looks at several positions do.
        """
        own = self._logits_of(self.outputs)[:1].astype(mx.float32)
        length = self.hidden.shape[1]
        parts = [
            self.head(self.hidden[:1, part], tokens[:1, part], self.parameters)
            for part in (slice(0, length // 2), slice(length // 2, length))
            if part.stop > part.start
        ]
        found = mx.concatenate(parts, 1).astype(mx.float32)
        difference, largest = float(mx.abs(found - own).max()), float(mx.abs(own).max())
        if not difference <= TOLERANCE * largest:
            raise ConfigurationError(
                f"chunk_size: the logits of the head alone differ from those of the model by "
                f"{difference:.3g}, so the head does not map each position by itself. Leave "
                "chunk_size out."
            )

    def _checked(self, results: list[Any], tokens: mx.array) -> mx.array:
        hidden = results[0] if len(results) == 1 else None
        if isinstance(hidden, (tuple, list)) and hidden:
            hidden = hidden[0]
        if not isinstance(hidden, mx.array) or hidden.shape[:-1] != tokens.shape:
            found = hidden.shape if isinstance(hidden, mx.array) else type(hidden).__name__
            raise ConfigurationError(
                f"chunk_size needs a body, here {self._prefix}, that is called once and returns "
                f"hidden states of shape {(*tokens.shape, 'dims')}; it was called {len(results)} "
                f"times and returned {found}. Leave chunk_size out."
            )
        return hidden

    def _stand_in(self, hidden: mx.array) -> _StandIn:
        """The body, returning ``hidden`` in whatever it returned hidden states in."""
        result = self._result
        if isinstance(result, (tuple, list)):
            return _StandIn(self._body, (hidden, *result[1:]))
        return _StandIn(self._body, hidden)

    @contextmanager
    def _replaced(self, other: Any) -> Iterator[None]:
        """The model with ``other`` in the place of its body, past ``Module.__setattr__``."""
        dict.__setitem__(self._parent, self._key, other)
        try:
            yield
        finally:
            dict.__setitem__(self._parent, self._key, self._body)


def logits_of(outputs: Any, tokens: mx.array | None) -> mx.array:
    """The logits among a model's outputs, of shape (batch, length, classes).

    Raises:
        ConfigurationError: there are none, or not one row for each token.
    """
    logits = outputs
    if isinstance(outputs, dict):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)) and outputs:
        logits = outputs[0]
    if not isinstance(logits, mx.array) or logits.ndim != 3:
        found = logits.shape if isinstance(logits, mx.array) else type(outputs).__name__
        raise ConfigurationError(
            f"The model returned {found}; the objective expects logits of shape (batch, length, "
            'classes), alone, first in a tuple, or as "logits" in a dict.'
        )
    if tokens is not None and logits.shape[:2] != tokens.shape:
        raise ConfigurationError(
            f"The model returned logits of shape {logits.shape} for tokens of shape "
            f"{tokens.shape}; expected one row of logits a token."
        )
    return logits


def num_embeddings(model: nn.Module) -> int | None:
    """Rows of the largest embedding, beyond which a token reads other memory."""
    tables = (nn.Embedding, nn.QuantizedEmbedding)
    rows = [m.weight.shape[0] for m in model.modules() if isinstance(m, tables)]
    return max(rows, default=None)


def check_split(model: nn.Module, num_tokens: int, logits_of: Callable[[Any], mx.array]) -> None:
    """Run a few tokens, of the first ``num_tokens``, through a model and through its head alone.

    Raises:
        ConfigurationError: the head cannot be run by itself, or gives other logits then.
    """
    # Not all the same: a head that averages over positions would pass.
    tokens = mx.arange(LENGTH)[None] % num_tokens
    SplitModel(model, tokens, lambda model: model(tokens), logits_of).check(tokens)


class _Listener:
    """Calls the body and keeps what it returns."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self.results: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.results.append(self._body(*args, **kwargs))
        return self.results[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _StandIn:
    """Returns given hidden states; notes which parts of the body the head uses (its embedding)."""

    def __init__(self, body: Any, result: Any) -> None:
        self._body = body
        self._result = result
        self.used: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._result

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._body, name)
        if isinstance(value, (nn.Module, mx.array)):  # not the list of blocks, whose length is read
            self.used.add(name)
        return value
