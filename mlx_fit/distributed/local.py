"""Strategies whose ranks train by themselves for a while, and then average their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays
from mlx_fit.checks import natural, number
from mlx_fit.distributed.buckets import Buckets, Named
from mlx_fit.distributed.ring import Ring
from mlx_fit.distributed.strategy import Strategy
from mlx_fit.distributed.sync import SyncPolicy
from mlx_fit.errors import ConfigurationError


class _Averaging(Strategy):
    """Local updates, and an outer step from the mean of all weights every so many."""

    def __init__(self, name: str, every: int, rate: float, momentum: float) -> None:
        self.name = name
        self.keeps_equal = False
        self.every = natural(f"{type(self).__name__}: every", every, 1)
        self.options = {"every": every, "outer_learning_rate": rate, "outer_momentum": momentum}
        self._rate = rate
        self._momentum = momentum
        self._buckets = Buckets(SyncPolicy())
        self._num_updates = 0  # since the ranks were equal
        self._anchor: Named = {}  # the weights of then
        self._velocity: Named = {}

    def check(self, sync: SyncPolicy) -> None:
        """Weights are exchanged, not gradients, and differ between the exchanges."""
        for name in ("reduce_dtype", "compress", "check_every"):
            if getattr(sync, name):
                raise ConfigurationError(
                    f"SyncPolicy({name}={getattr(sync, name)!r}) does nothing with "
                    f"strategy={self.name!r}, which averages weights in float32 every {self.every} "
                    "updates. Leave it out, or use strategy='data_parallel'."
                )

    def start(self, buckets: Buckets, optimizer: Any, ring: Ring) -> Any:
        """Every rank has an optimizer of its own."""
        self._num_updates, self._anchor, self._velocity = 0, {}, {}
        self._buckets = buckets
        return optimizer

    def reduce(
        self, ring: Ring, gradients: Named, statistics: Named, own: float, weight: float
    ) -> tuple[Named, Named, float]:
        """This rank's own."""
        return gradients, statistics, own

    def update(self, ring: Ring, model: nn.Module, apply: Callable[[], mx.array]) -> mx.array:
        """This rank's own update."""
        self._remember(model)
        return apply()

    def _remember(self, model: nn.Module) -> None:
        """The weights that all ranks have, at the first update since they were equal."""
        if self._is_outer and not self._anchor:
            self._anchor = _weights(model)

    @property
    def _is_outer(self) -> bool:
        """Whether there is an outer step, and not the plain mean."""
        return (self._rate, self._momentum) != (1.0, 0.0)

    def after_update(self, ring: Ring, model: nn.Module) -> None:
        """Average, if it is time."""
        self._remember(model)  # a rank that had no samples still has them
        self._num_updates += 1
        if self._num_updates >= self.every:
            self._meet(ring, model)

    def finish(self, ring: Ring, model: nn.Module) -> None:
        """Average what was done since the last time."""
        if self._num_updates:
            self._meet(ring, model)

    def _meet(self, ring: Ring, model: nn.Module) -> None:
        weights = _weights(model)
        mx.eval(weights)
        floats = {name: value.astype(mx.float32) for name, value in weights.items()}
        sums = self._buckets.summed(ring, floats)
        trained = {name for name, _ in named_arrays(model.trainable_parameters())}
        found = {name: total / ring.size for name, total in sums.items()}
        for name in found:
            if self._is_outer and name in trained:
                found[name] = self._outer(name, found[name])
        found = {name: value.astype(weights[name].dtype) for name, value in found.items()}
        mx.eval(found, self._velocity)
        assign(model, found.items())
        self._anchor, self._num_updates = {}, 0

    def _outer(self, name: str, mean: mx.array) -> mx.array:
        """SGD with Nesterov momentum on what the weights have moved by since they were equal."""
        before = self._anchor.get(name)
        if before is None:  # it was frozen then
            return mean
        before = before.astype(mx.float32)
        moved = before - mean
        velocity = self._momentum * self._velocity.get(name, mx.zeros_like(moved)) + moved
        self._velocity[name] = velocity
        return before - self._rate * (moved + self._momentum * velocity)

    def state_dict(self, ring: Ring) -> dict[str, Any]:
        """Updates since the ranks were equal, the weights of then, and the outer momentum."""
        return {
            "num_updates": self._num_updates,
            "anchor": dict(self._anchor),
            "velocity": dict(self._velocity),
        }

    def load_state_dict(self, state: dict[str, Any], ring: Ring) -> None:
        """Go on inside a round; what each rank had done in it is rank 0's."""
        self._num_updates = state["num_updates"]
        self._anchor, self._velocity = dict(state["anchor"]), dict(state["velocity"])


def _weights(model: nn.Module) -> Named:
    """What is averaged: trained weights and running statistics."""
    trained = {name for name, _ in named_arrays(model.trainable_parameters())}
    return {
        name: value
        for name, value in named_arrays(model.parameters())
        if name in trained or name.rpartition(".")[2].startswith("running_")
    }


class LocalSGD(_Averaging):
    """Each rank updates its own weights, and all take their mean every ``every`` updates and at the
    end of a fit (Stich, "Local SGD converges fast and communicates little", 2019).

    Between these the ranks differ: an evaluation is a mean over ranks, each with its own weights
    for its rows, and a checkpoint holds rank 0's.

    Args:
        every: updates between means.

    Example:
        >>> LocalSGD(every=16).every
        16
    """

    def __init__(self, every: int = 8) -> None:
        super().__init__("local_sgd", every, 1.0, 0.0)


class DiLoCo(_Averaging):
    """:class:`LocalSGD` whose mean is not taken as it is: an outer step of SGD with Nesterov
    momentum goes towards it (Douillard et al., "DiLoCo", arXiv 2311.08105, algorithm 1).

    Args:
        every: updates between outer steps.
        outer_learning_rate: of the outer step; 1, with momentum 0, is :class:`LocalSGD`.
        outer_momentum: of the outer step, below 1.
    """

    def __init__(
        self, every: int = 8, outer_learning_rate: float = 0.7, outer_momentum: float = 0.9
    ) -> None:
        rate = number("DiLoCo: outer_learning_rate", outer_learning_rate, 0.0)
        momentum = number("DiLoCo: outer_momentum", outer_momentum, 0.0, 0.999999)
        super().__init__("diloco", every, rate, momentum)
