"""Where a run's numbers can go beside files: experiment trackers, behind three methods.

A :class:`Logger` is anything with ``log_config``, ``log_scalars`` and ``close``; the callback
``LoggerCallback`` drives one. ``WandbLogger`` and ``MLflowLogger`` need ``wandb`` and ``mlflow``.
"""

from mlx_fit.loggers.base import Logger, ResumableLogger
from mlx_fit.loggers.mlflow import MLflowLogger
from mlx_fit.loggers.wandb import WandbLogger

__all__ = ["Logger", "MLflowLogger", "ResumableLogger", "WandbLogger"]
