"""What a model does differently for a while: recomputed blocks, noise on embeddings.

Single modules get a subclass of their class inside the context: Python looks calls up there. No
class is changed, and names and parameters stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays
from mlx_fit.checks import number
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import LoRAEmbedding
from mlx_fit.finetune.blocks import (
    is_embedding,
    listed,
    names_of,
    ordered_modules,
    require_blocks,
)


@contextmanager
def checkpoint_layers(model: nn.Module) -> Iterator[None]:
    """Training inside keeps only the inputs of each block and computes the rest of it again.

    That saves the memory of activations for a forward pass more (Chen et al. 2016, arXiv
    1604.06174). Losses and gradients stay the same; with dropout they are those of other draws,
    the same in both passes. Evaluation is not touched.

        with finetune.checkpoint_layers(model):
            trainer.fit(batches)

    Args:
        model: has a stack of blocks: the longest list of modules of one type.

    Raises:
        ConfigurationError: it has no blocks, or blocks with a random layer other than
            ``nn.Dropout``, whose second draw would differ from its first.
    """
    blocks = require_blocks(model, "checkpoint_layers()")
    other = (nn.Dropout2d, nn.Dropout3d)
    random = [n for n, m in ordered_modules(model) if isinstance(m, other) and blocks.holds(n)]
    if random:
        raise ConfigurationError(
            "checkpoint_layers() can repeat the draws of nn.Dropout alone, not of "
            f"{listed(random)}."
        )
    with calling([*blocks.modules], _recomputed):
        yield


@contextmanager
def neftune(model: nn.Module, alpha: float = 5.0) -> Iterator[None]:
    """Training inside adds uniform noise to the token embeddings (NEFTune, arXiv 2310.05914).

    The noise has the size ``alpha / sqrt(length * dims)``; evaluation has none.

    Args:
        model: has an ``nn.Embedding``, quantized or adapted.
        alpha: 5, 10 and 15 in the paper.

    Raises:
        ConfigurationError: there is no embedding, or ``alpha`` is not positive.
    """
    alpha = number("alpha", alpha, above=0.0)
    tables = [
        (name, module)
        for name, module in ordered_modules(model)
        if isinstance(module, LoRAEmbedding) or is_embedding(module)
    ]
    if not tables:
        raise ConfigurationError(
            f"neftune() needs an embedding, and {type(model).__name__} has none: "
            f"{listed(names_of(model))}."
        )

    def noisy(kind: type, module: Any, *args: Any, **kwargs: Any) -> mx.array:
        embedded = kind.__call__(module, *args, **kwargs)
        if not module.training:
            return embedded
        size = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + mx.random.uniform(-size, size, embedded.shape).astype(embedded.dtype)

    with calling([tables[0][1]], noisy):
        yield


@contextmanager
def calling(modules: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Modules whose calls go to ``call(their class, module, *args)`` inside."""
    originals = [(module, type(module)) for module in {id(m): m for m in modules}.values()]

    def redirected(kind: type) -> type:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(kind, self, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__call__": method})

    classes = {kind: redirected(kind) for _, kind in originals}
    for module, kind in originals:
        module.__class__ = classes[kind]
    try:
        yield
    finally:
        for module, kind in originals:
            module.__class__ = kind


def _recomputed(kind: type, block: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's call under ``mx.checkpoint``, whose gradients reach its inputs and parameters."""
    if not block.training:
        return kind.__call__(block, *args, **kwargs)
    positions = [i for i, arg in enumerate(args) if _is_float(arg)]
    keys = [key for key, arg in kwargs.items() if _is_float(arg)]
    named = named_arrays(block.trainable_parameters())
    names, parameters = [n for n, _ in named], [p for _, p in named]
    dropouts = [m for m in block.modules() if isinstance(m, nn.Dropout) and m.training]
    # Recomputing draws again, and from MLX's global key it would draw something else.
    key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) if dropouts else mx.array(0)

    def call(parameters: list[mx.array], inputs: list[mx.array], named: list[mx.array]) -> Any:
        given, options = list(args), dict(kwargs)
        for position, value in zip(positions, inputs, strict=True):
            given[position] = value
        options.update(zip(keys, named, strict=True))
        assign(block, zip(names, parameters, strict=True))
        with calling(dropouts, _keyed_dropout(key)):
            return kind.__call__(block, *given, **options)

    try:
        inputs = [args[i] for i in positions], [kwargs[k] for k in keys]
        return mx.checkpoint(call)(parameters, *inputs)
    finally:
        assign(block, zip(names, parameters, strict=True))


def _keyed_dropout(key: mx.array) -> Callable[..., mx.array]:
    """``nn.Dropout``'s call, each drawing from the next part of ``key``."""
    state = [key]

    def call(kind: type, module: Any, x: mx.array) -> mx.array:
        keep = module._p_1
        if keep == 1:
            return x
        state[0], own = mx.random.split(state[0])
        return (1 / keep) * mx.random.bernoulli(keep, x.shape, own) * x

    return call


def _is_float(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
