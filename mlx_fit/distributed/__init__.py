"""Training on several processes and machines: strategies, and how ranks exchange gradients."""

from mlx_fit.distributed.strategy import DataParallel
from mlx_fit.distributed.sync import SyncPolicy
from mlx_fit.distributed.trainer import DistributedTrainer

__all__ = ["DataParallel", "DistributedTrainer", "SyncPolicy"]
