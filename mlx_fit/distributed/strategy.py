"""What distinguishes the ways of training on several ranks: three moments of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.distributed.buckets import Buckets
from mlx_fit.distributed.ring import Ring
from mlx_fit.distributed.sync import SyncPolicy

Named = dict[str, mx.array]


class Strategy(ABC):
    """How gradients of several ranks become an update of the weights.

    Attributes:
        name: what a trainer's ``strategy=`` calls it.
    """

    name: str

    @abstractmethod
    def start(self, buckets: Buckets, optimizer: Any, ring: Ring) -> Any:
        """A run begins.

        Args:
            buckets: sums over the ranks, as the sync policy wants them.
            optimizer: the user's.
            ring: the ranks.

        Returns:
            The optimizer that the step uses.
        """

    @abstractmethod
    def reduce(
        self, ring: Ring, gradients: Named, statistics: Named, weight: float
    ) -> tuple[Named, Named]:
        """Gradients and running statistics, each times its weight, summed over the ranks.

        Args:
            ring: the ranks.
            gradients: float32, by name, times this rank's weight.
            statistics: the same of running statistics.
            weight: of all ranks together.
        """

    @abstractmethod
    def update(self, ring: Ring, model: nn.Module, apply: Callable[[], mx.array]) -> mx.array:
        """Update the weights: ``apply()`` does it as a single process would."""


class DataParallel(Strategy):
    """Every rank has everything, and makes the same update from the sum of all gradients."""

    def __init__(self) -> None:
        self.name = "data_parallel"
        self._buckets = Buckets(SyncPolicy())

    def start(self, buckets: Buckets, optimizer: Any, ring: Ring) -> Any:
        """The optimizer stays as it is."""
        self._buckets = buckets
        return optimizer

    def reduce(
        self, ring: Ring, gradients: Named, statistics: Named, weight: float
    ) -> tuple[Named, Named]:
        """One sum over the ranks."""
        return self._buckets.sum(ring, gradients, statistics, weight)

    def update(self, ring: Ring, model: nn.Module, apply: Callable[[], mx.array]) -> mx.array:
        """The same on every rank."""
        return apply()
