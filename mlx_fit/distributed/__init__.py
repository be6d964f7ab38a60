"""Training on several processes and machines: strategies, and how ranks exchange gradients."""

from mlx_fit.distributed.local import DiLoCo, LocalSGD
from mlx_fit.distributed.sharded_optimizer import ShardedOptimizer
from mlx_fit.distributed.strategy import Strategy
from mlx_fit.distributed.sync import SyncPolicy
from mlx_fit.distributed.sync_monitor import SyncMonitor
from mlx_fit.distributed.synchronous import DataParallel, ParameterServer, Zero1
from mlx_fit.distributed.trainer import DistributedTrainer

__all__ = [
    "DataParallel",
    "DiLoCo",
    "DistributedTrainer",
    "LocalSGD",
    "ParameterServer",
    "ShardedOptimizer",
    "Strategy",
    "SyncMonitor",
    "SyncPolicy",
    "Zero1",
]
