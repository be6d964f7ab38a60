"""ZeRO-1 for a training loop that you write yourself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit._tree import named_arrays
from mlx_fit.checks import number
from mlx_fit.distributed.buckets import Buckets
from mlx_fit.distributed.ring import Ring, connect, rank_and_size
from mlx_fit.distributed.spread_optimizer import SpreadOptimizer
from mlx_fit.distributed.sync import SyncPolicy
from mlx_fit.distributed.synchronous import division_of
from mlx_fit.distributed.windows import unnamed
from mlx_fit.errors import ConfigurationError
from mlx_fit.state import load_optimizer


class ShardedOptimizer:
    """An MLX optimizer on several ranks, each with its part of the state, for your own loop.

    ``update(model, gradients)`` averages the gradients of all ranks, updates this rank's part of
    the weights, and gets the others'. All ranks call it together, with the same model. Compile the
    function that computes gradients, not the one that calls ``update``. In one process it is the
    optimizer itself.

    Args:
        optimizer: any MLX optimizer but a ``MultiOptimizer``.
        sync: how gradients are exchanged.

    Attributes:
        rank, size: of this process, from 0, and how many there are.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> model, optimizer = nn.Linear(4, 2), ShardedOptimizer(optim.AdamW(1e-2))
        >>> step = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
        >>> loss, gradients = step(mx.ones((8, 4)), mx.zeros((8, 2)))
        >>> optimizer.update(model, gradients, weight=8)
        >>> int(optimizer.step)
        1
    """

    def __init__(self, optimizer: optim.Optimizer, sync: SyncPolicy | None = None) -> None:
        if not isinstance(optimizer, optim.Optimizer):
            raise ConfigurationError(
                f"optimizer is {optimizer!r}; expected an MLX optimizer, such as "
                "mlx.optimizers.AdamW(learning_rate=1e-3)."
            )
        self.optimizer = optimizer
        self._policy = SyncPolicy() if sync is None else sync
        self._buckets = Buckets(self._policy)
        self._ring: Ring | None = None
        self._spread: SpreadOptimizer | None = None
        if isinstance(optimizer, optim.MultiOptimizer):
            raise ConfigurationError(
                "The state of a MultiOptimizer cannot be spread over ranks. Use one optimizer, or "
                "average the gradients with mlx.nn.average_gradients and keep it on every rank."
            )
        self.rank, self.size = rank_and_size()

    def init(self, parameters: Any) -> None:
        """Divide the parameters over the ranks, and make this rank's state."""
        if self.size == 1:
            self.optimizer.init(parameters)
        else:
            self._meet().init(parameters)

    def _meet(self) -> SpreadOptimizer:
        if self._spread is None:
            self._ring = connect(self.rank, self.size, self._policy.timeouts, {}, "join")
            self._spread = SpreadOptimizer(self.optimizer, self._ring, division_of(self.optimizer))
        return self._spread

    def update(self, model: nn.Module, gradients: Any, weight: float = 1.0) -> None:
        """Average gradients over the ranks, and update the model's weights.

        Args:
            model: whose trainable parameters are updated, in place.
            gradients: of this rank's mean loss, a tree like the trainable parameters.
            weight: what that mean weighs: rows or tokens. 0 on a rank without samples, whose
                gradients must be zeros then. A sum of 0 over all ranks makes no update.
        """
        number("ShardedOptimizer.update: weight", weight, 0.0)
        if self.size == 1:
            if weight:
                self.optimizer.update(model, gradients)
            return
        parameters = model.trainable_parameters()
        spread = self._meet()
        spread.init(parameters)
        assert self._ring is not None
        (total,) = self._ring.sum([mx.array(float(weight))], "header")
        whole = float(np.array(total))
        if not whole:
            return
        weighed = {n: g.astype(mx.float32) * weight for n, g in named_arrays(gradients)}
        sums, _ = self._buckets.sum(self._ring, weighed, {}, whole)
        dtypes = {name: value.dtype for name, value in named_arrays(gradients)}
        means = {name: (value / whole).astype(dtypes[name]) for name, value in sums.items()}
        spread.update(model, unnamed(gradients, means))
        spread.gather(model)
        mx.eval(model.state, spread.state)

    @property
    def state(self) -> dict[str, Any]:
        """This rank's state."""
        state: dict[str, Any] = self.optimizer.state
        return state

    @property
    def step(self) -> mx.array:
        """Updates so far."""
        step: mx.array = self.optimizer.step
        return step

    @property
    def learning_rate(self) -> Any:
        """The learning rate; assign it on all ranks alike."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        self.optimizer.learning_rate = rate

    def whole_state(self) -> dict[str, mx.array]:
        """The state as one process would have it, by name, for a file; all ranks call it."""
        if self._spread is None:
            return dict(named_arrays(self.optimizer.state))
        return self._spread.whole_state()

    def load_whole_state(self, parameters: Any, arrays: Mapping[str, mx.array]) -> None:
        """Take a state from :meth:`whole_state`, of any number of ranks; all ranks call it.

        Args:
            parameters: the model's trainable parameters.
            arrays: name -> array.
        """
        self.init(parameters)
        if self._spread is not None:
            self._spread.load_whole_state(arrays)
            return
        load_optimizer(self.optimizer, arrays)
