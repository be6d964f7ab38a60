"""DistributedTrainer: the trainer, on several ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.checks import boolean
from mlx_fit.communicator import check_same, of_first, reporting
from mlx_fit.distributed.aligning import align, align_key, check_plan, plan_of
from mlx_fit.distributed.balance import Balance
from mlx_fit.distributed.buckets import Buckets
from mlx_fit.distributed.ring import connect, rank_and_size
from mlx_fit.distributed.sharing import share_memory
from mlx_fit.distributed.strategies import strategy_of
from mlx_fit.distributed.strategy import Strategy
from mlx_fit.distributed.strategy_state import StrategyState
from mlx_fit.distributed.sync import SyncPolicy
from mlx_fit.distributed.windows import Windows
from mlx_fit.errors import ConfigurationError
from mlx_fit.pass_steps import PassSteps
from mlx_fit.rates import OptimizerSetup
from mlx_fit.state import PartialOptimizer
from mlx_fit.trainer import Trainer

UNEVEN = ("join", "stop")


class DistributedTrainer(Trainer):
    """:class:`Trainer` on several ranks: processes that train one model together.

    A script that uses it is started once for each rank, by ``mlx-fit launch -n 4 -- python
    train.py``, ``mlx.launch`` or ``mpirun``. Started alone it is a :class:`Trainer`, bit for bit.

    ``batch_size`` is that of all ranks together. Arrays, datasets and :class:`DataLoader` are
    split: batch t holds the same rows on any number of ranks, and each rank gets its share of them.
    Any other iterable yields a rank's own part. Loss, metrics and gradients are summed with their
    weights over all ranks and divided once, so results are those of one process.

    All ranks call ``fit``, ``evaluate``, ``predict``, ``save`` and ``load`` together. Rank 0 writes
    files and prints; callbacks run on every rank, with the same values, apart from those that only
    write. A stop that one rank asks for, and a signal to one rank, end all of them after the next
    update. ``predict_on_batch`` is this rank's own. After an error on one rank nothing is saved.
    What :class:`~mlx_fit.data.MapBatches` draws depends on the rows that a rank gets of a batch.

    Args:
        model, optimizer, loss, metrics: as for :class:`Trainer`. Rank 0's weights are used.
        strategy: ``"data_parallel"``, ``"zero1"``, ``"parameter_server"``, ``"local_sgd"``,
            ``"diloco"``, or a strategy object of ``mlx_fit.distributed``.
        sync: how gradients are exchanged, and how long ranks wait for each other.
        uneven: for iterables that give some ranks fewer batches than others, or none. ``"join"``:
            those that have ended take part without samples until all have ended. ``"stop"``: all
            end with the first.
        balance: measure in each epoch how fast the ranks are, and let faster ones read more rows
            of each batch in the next: results stay the same up to rounding. For data that the
            trainer splits.
        options: the other arguments of :class:`Trainer`. With ``on_oom="split"`` a rank that runs
            out of memory makes all of them compute that window, and what follows, in equally small
            parts; they agree with one number an update.

    Attributes:
        rank, size: of this process, from 0, and how many there are.

    Raises:
        ConfigurationError: an argument cannot work, or differs between the ranks.
        RendezvousError: ranks did not come.
        PlanMismatchError: they have different models.

    Example:
        >>> import mlx.nn as nn, mlx.optimizers as optim, numpy as np
        >>> model = nn.Linear(4, 2)
        >>> trainer = DistributedTrainer(model, optim.SGD(0.1), "mse", batch_size=8, seed=0)
        >>> data = np.ones((32, 4), np.float32), np.zeros((32, 2), np.float32)
        >>> history = trainer.fit(data, epochs=2, verbose=0)
        >>> trainer.rank, trainer.size
        (0, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer | None = None,
        loss: Any = None,
        metrics: Any = (),
        *,
        strategy: str | Strategy = "data_parallel",
        sync: SyncPolicy | None = None,
        uneven: str = "join",
        balance: bool = False,
        **options: Any,
    ) -> None:
        policy = SyncPolicy() if sync is None else sync
        if not isinstance(policy, SyncPolicy):
            raise ConfigurationError(
                f"sync={sync!r}; expected a SyncPolicy, such as SyncPolicy(timeout=30)."
            )
        if uneven not in UNEVEN:
            raise ConfigurationError(f"uneven={uneven!r}; expected 'join' or 'stop'.")
        boolean("balance", balance)
        chosen = strategy_of(strategy)
        chosen.check(policy)
        super().__init__(model, optimizer, loss, metrics, **options)
        self.rank, self.size = rank_and_size()
        if self.size == 1:
            return
        plan = {"parameters": plan_of(model), "strategy": chosen.name, "seed": self._seed}
        self.communicator = ring = connect(self.rank, self.size, policy.timeouts, plan, uneven)
        with reporting(ring):
            check_plan(ring, plan_of(model))
            settings = self._arguments | {"batch_size": self.batch_size, "uneven": uneven}
            settings |= {
                "balance": balance,
                "strategy": chosen.name,
                "sync": policy,
                "seed": self._seed,
            }
            settings |= chosen.options | self._setup.settings
            check_same(ring, {f"DistributedTrainer's {k}": v for k, v in settings.items()})
            self._order_seed = of_first(ring, self._order_seed)
            self._make_exchange = partial(Windows, ring, chosen, policy.check_every)
            has_limit = self.device_config.memory_limit is not None
            self._pass_steps = PassSteps(self._options, has_limit, self.size)
            self._align = partial(self._start_alike, ring)
            self.optimizer = chosen.start(Buckets(policy), optimizer, ring)
            self._setup = OptimizerSetup(self.optimizer)
            if policy.compress is not None or not chosen.keeps_equal:
                self._own_callbacks.append(StrategyState(chosen, ring))
            if balance:
                ring.balances = True
                self._own_callbacks.append(Balance(ring))
            align(ring, {"The weights": model.state})
            with self.device_config.applied():
                share_memory(ring)

    def _start_alike(self, ring: Any) -> None:
        """Weights, optimizer state and random key of rank 0 on all ranks; shares of memory."""
        check_plan(ring, plan_of(self.model))
        trees: dict[str, Any] = {"The weights": self.model.state}
        if self.optimizer is not None:
            self.optimizer.init(self.model.trainable_parameters())
        if self.optimizer is not None and not isinstance(self.optimizer, PartialOptimizer):
            trees["The optimizer's arrays"] = self.optimizer.state
        align(ring, trees)
        align_key(ring)
        mx.eval(self.model.state)
        with self.device_config.applied():
            share_memory(ring)
