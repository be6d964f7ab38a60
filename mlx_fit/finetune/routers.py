"""The load-balancing loss of a mixture of experts, from what its routers say in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.checks import number
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import AdapterLayer
from mlx_fit.finetune.blocks import is_linear, listed, names_of, ordered_modules
from mlx_fit.finetune.contexts import calling

CHOSEN = ("num_experts_per_tok", "top_k")  # what mlx-lm's classes call the experts of a token


class RouterLoss:
    """Keeps the experts of a mixture equally busy: an ``aux_loss`` for :class:`~mlx_fit.CausalLM`.

    For each mixture ``experts * sum(f * P)``, where ``f`` is the mean number of an expert's tokens
    a position and ``P`` its mean probability (Fedus et al. 2021, arXiv 2101.03961, equations 4 to
    6, for several experts a token as in transformers' Mixtral); their mean over the mixtures, times
    ``weight``. Balanced routers give ``weight`` times the experts of a token. Padding counts too.

    A context: it listens to the routers inside.

        with finetune.RouterLoss(model, 0.01) as aux_loss:
            Trainer(model, optimizer, objective=CausalLM(aux_loss=aux_loss)).fit(batches)

    Args:
        model: its mixtures have a linear ``gate`` beside ``switch_mlp``, as those of mlx-lm's
            Mixtral, Qwen and OLMoE have, and say how many experts a token gets.
        weight: factor of the loss.

    Raises:
        ConfigurationError: there is no such mixture, or ``weight`` is not positive.
    """

    def __init__(self, model: nn.Module, weight: float = 0.01) -> None:
        self.weight = number("weight", weight, 0.0)
        if not self.weight:
            raise ConfigurationError("weight=0 leaves the routers alone; expected above 0.")
        self._routers = dict(_routers(model))
        if not self._routers:
            raise ConfigurationError(
                f"RouterLoss needs a mixture of experts with a linear 'gate' beside 'switch_mlp', "
                f"and {type(model).__name__} has none: {listed(names_of(model))}."
            )
        self._gates = {id(gate): name for name, (gate, _) in self._routers.items()}
        self._logits: dict[str, mx.array] = {}
        self._contexts = ExitStack()

    def __enter__(self) -> RouterLoss:
        """Listen to the routers."""
        gates = [gate for gate, _ in self._routers.values()]
        self._contexts.enter_context(calling(gates, self._heard))
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()
        self._logits.clear()

    def __call__(self, model: nn.Module, outputs: Any) -> mx.array:
        """The loss of the newest forward pass, a float32 scalar."""
        if missing := sorted(self._routers.keys() - self._logits.keys()):
            raise ConfigurationError(
                f"RouterLoss has not heard {listed(missing)}: train inside `with RouterLoss(...)`."
            )
        losses = [
            balance(self._logits[name], chosen) for name, (_, chosen) in self._routers.items()
        ]
        self._logits.clear()
        return self.weight * mx.stack(losses).mean()

    def _heard(self, kind: Any, gate: Any, *args: Any, **kwargs: Any) -> mx.array:
        logits: mx.array = kind.__call__(gate, *args, **kwargs)
        self._logits[self._gates[id(gate)]] = logits
        return logits


def balance(logits: mx.array, chosen: int) -> mx.array:
    """The load-balancing loss of one router.

    Args:
        logits: shape (..., experts).
        chosen: experts of a token.
    """
    experts = logits.shape[-1]
    flat = logits.reshape(-1, experts).astype(mx.float32)
    best = mx.argpartition(-mx.stop_gradient(flat), kth=chosen - 1, axis=-1)[:, :chosen]
    is_chosen = (best[:, :, None] == mx.arange(experts)).astype(mx.float32).sum(1)
    return experts * (is_chosen.mean(0) * mx.softmax(flat, -1).mean(0)).sum()


def _routers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Name -> a mixture's gate, and the experts of a token."""
    for name, module in ordered_modules(model):
        gate = module.get("gate")
        if "switch_mlp" not in module or not isinstance(gate, nn.Module):
            continue
        chosen = next((getattr(module, key) for key in CHOSEN if hasattr(module, key)), None)
        if isinstance(chosen, int) and (is_linear(gate) or isinstance(gate, AdapterLayer)):
            yield f"{name}.gate", (gate, chosen)
