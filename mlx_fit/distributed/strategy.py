"""What distinguishes the ways of training on several ranks: three moments of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.distributed.buckets import Buckets, Named
from mlx_fit.distributed.ring import Ring
from mlx_fit.distributed.sync import SyncPolicy


class Strategy(ABC):
    """How gradients of several ranks become an update of the weights.

    A strategy object is used by one trainer. Only the three moments differ: the trainer never asks
    which strategy it has.

    Attributes:
        name: what a trainer's ``strategy=`` calls it.
        options: its arguments, which all ranks need alike.
        keeps_equal: whether all ranks have equal weights after every update.
    """

    name: str
    options: dict[str, Any]
    keeps_equal: bool

    @abstractmethod
    def check(self, sync: SyncPolicy) -> None:
        """Raise if the strategy cannot do what a sync policy asks for."""

    @abstractmethod
    def start(self, buckets: Buckets, optimizer: Any, ring: Ring) -> Any:
        """Before training: how sums are sent; returns the optimizer that this rank uses."""

    @abstractmethod
    def reduce(
        self, ring: Ring, gradients: Named, statistics: Named, own: float, weight: float
    ) -> tuple[Named, Named, float]:
        """Gradients and running statistics to go on with, and what both are divided by.

        Args:
            ring: the ranks.
            gradients: float32, by name, times this rank's weight.
            statistics: the same of running statistics.
            own: this rank's weight.
            weight: that of all ranks together, not 0.
        """

    @abstractmethod
    def update(self, ring: Ring, model: nn.Module, apply: Callable[[], mx.array]) -> mx.array:
        """Update the weights: ``apply()`` does it as a single process would."""

    @abstractmethod
    def after_update(self, ring: Ring, model: nn.Module) -> None:
        """What follows, on every rank, whether it had samples or not."""

    @abstractmethod
    def finish(self, ring: Ring, model: nn.Module) -> None:
        """The fit ends: all ranks get equal weights."""

    @abstractmethod
    def state_dict(self, ring: Ring) -> dict[str, Any]:
        """What a checkpoint must hold of it: plain values and arrays. Collective."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], ring: Ring) -> None:
        """Take back what :meth:`state_dict` gave."""
