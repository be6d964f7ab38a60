"""Strategies that make the update of one process: all ranks have equal weights after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.distributed.buckets import Buckets, Named
from mlx_fit.distributed.partition import Partition, Sizes, elementwise, on_rank_0, whole_parameters
from mlx_fit.distributed.ring import Ring
from mlx_fit.distributed.spread_optimizer import SpreadOptimizer
from mlx_fit.distributed.strategy import Strategy
from mlx_fit.distributed.sync import SyncPolicy

# Each element of a parameter is updated by itself, so a flat piece of one can be.
ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.AdaDelta, optim.Lion),
)


def division_of(optimizer: Any) -> Callable[[Sizes, int], Partition]:
    """How the state of an optimizer can be divided: in flat pieces, or by whole parameters."""
    return elementwise if type(optimizer) in ELEMENTWISE else whole_parameters


class _Synchronous(Strategy):
    """One sum of gradients an update; what is where differs."""

    def __init__(
        self, name: str, divide: Callable[[Any], Callable[[Sizes, int], Partition]] | None
    ) -> None:
        self.name = name
        self.options = {}
        self.keeps_equal = True
        self._divide = divide
        self._buckets = Buckets(SyncPolicy())
        self._spread: SpreadOptimizer | None = None

    def check(self, sync: SyncPolicy) -> None:
        """Every policy will do."""

    def start(self, buckets: Buckets, optimizer: Any, ring: Ring) -> Any:
        """The user's optimizer, or one that has this rank's part of its state."""
        self._buckets = buckets
        if self._divide is None or optimizer is None:
            return optimizer
        self._spread = SpreadOptimizer(optimizer, ring, self._divide(optimizer))
        return self._spread

    def reduce(
        self, ring: Ring, gradients: Named, statistics: Named, own: float, weight: float
    ) -> tuple[Named, Named, float]:
        """The sums of all ranks."""
        return *self._buckets.sum(ring, gradients, statistics, weight), weight

    def update(self, ring: Ring, model: nn.Module, apply: Callable[[], mx.array]) -> mx.array:
        """The same on every rank, or each its part, which all of them then get."""
        vector = apply()
        if self._spread is not None:
            mx.eval(vector, model.state, self._spread.state)
            self._spread.gather(model)
        return vector

    def after_update(self, ring: Ring, model: nn.Module) -> None:
        """Nothing: the ranks are equal."""

    def finish(self, ring: Ring, model: nn.Module) -> None:
        """Nothing: the ranks are equal."""

    def state_dict(self, ring: Ring) -> dict[str, Any]:
        """What compression has yet to send; weights and optimizer say all else."""
        compressor = self._buckets.compressor
        return {} if compressor is None else compressor.state_dict(ring)

    def load_state_dict(self, state: dict[str, Any], ring: Ring) -> None:
        """Send it later."""
        if self._buckets.compressor is not None and state:
            self._buckets.compressor.load_state_dict(state, ring)


class DataParallel(_Synchronous):
    """Every rank has everything, and makes the same update from the sum of all gradients."""

    def __init__(self) -> None:
        super().__init__("data_parallel", None)


class Zero1(_Synchronous):
    """Every rank keeps the optimizer's state of its part of the weights, 1/N of it, updates that
    part, and gets the others' (Rajbhandari et al., "ZeRO", 2020, section 5: P_os).

    For optimizers that update each element by itself (SGD, Adam, AdamW, Adamax, RMSprop, Adagrad,
    AdaDelta, Lion) parts are equal flat pieces, and the weights are those of ``DataParallel`` to
    the bit. For all others (Adafactor, Muon, your own) parts are whole parameters.
    """

    def __init__(self) -> None:
        super().__init__("zero1", division_of)


class ParameterServer(_Synchronous):
    """Rank 0 alone keeps the optimizer's state and updates; the others get the weights from it."""

    def __init__(self) -> None:
        super().__init__("parameter_server", lambda optimizer: on_rank_0)
