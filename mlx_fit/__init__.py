"""mlx_fit: Keras-style training for Apple's MLX, with PyTorch ergonomics.

    trainer = Trainer(model, optimizer, loss="cross_entropy", metrics=["accuracy"])
    history = trainer.fit((x, y), val, epochs=10, callbacks=[EarlyStopping(patience=3)])

Every public name is listed in ``__all__``, and imported when it is first used.
"""

from typing import TYPE_CHECKING

# NumPy comes before the BLAS, whose threads spin for a while and would make its import slower.
import numpy as _numpy  # noqa: F401

# On Linux a fast BLAS has to be loaded before mlx.core is; everything below imports mlx.core.
from mlx_fit.runtime import blas as _blas

_blas.preload()

from mlx_fit._lazy import lazy
from mlx_fit._version import __version__
from mlx_fit.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWriteError,
    CollectiveTimeoutError,
    ConfigurationError,
    DataError,
    DeviceError,
    DistributedError,
    MlxFitError,
    NonFiniteLossError,
    OutOfMemoryError,
    ParameterDesyncError,
    PeerError,
    PeerLostError,
    PlanMismatchError,
    Preempted,
    RendezvousError,
    ResumeError,
    UnknownMonitorError,
    WorkerError,
)

if TYPE_CHECKING:
    from mlx_fit import (
        callbacks,
        data,
        datasets,
        distributed,
        errors,
        finetune,
        interop,
        lightning,
        loggers,
        losses,
        metrics,
        schedules,
        text,
    )
    from mlx_fit.callbacks import (
        EMA,
        SWA,
        Callback,
        CSVLogger,
        DeviceMonitor,
        EarlyStopping,
        FreezeUntil,
        GradientMonitor,
        JSONLogger,
        LambdaCallback,
        LearningRateFinder,
        LearningRateScheduler,
        LoggerCallback,
        ModelCheckpoint,
        Predictions,
        Profiler,
        ReduceLROnPlateau,
        RemoteLogger,
        TensorBoard,
        TerminateOnNaN,
        Timer,
        find_learning_rate,
    )
    from mlx_fit.causal_lm import CausalLM
    from mlx_fit.checkpoint import CheckpointPolicy
    from mlx_fit.data import DataLoader
    from mlx_fit.distributed import DistributedTrainer, SyncPolicy
    from mlx_fit.dpo import DPO
    from mlx_fit.history import History
    from mlx_fit.losses import Loss
    from mlx_fit.metrics import Metric
    from mlx_fit.objective import Objective, Sums, Supervised
    from mlx_fit.orpo import ORPO
    from mlx_fit.plan import MemoryPlan
    from mlx_fit.runtime.device import DeviceConfig
    from mlx_fit.trainer import Trainer


__all__ = [
    "DPO",
    "EMA",
    "ORPO",
    "SWA",
    "CSVLogger",
    "Callback",
    "CausalLM",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointPolicy",
    "CheckpointWriteError",
    "CollectiveTimeoutError",
    "ConfigurationError",
    "DataError",
    "DataLoader",
    "DeviceConfig",
    "DeviceError",
    "DeviceMonitor",
    "DistributedError",
    "DistributedTrainer",
    "EarlyStopping",
    "FreezeUntil",
    "GradientMonitor",
    "History",
    "JSONLogger",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateScheduler",
    "LoggerCallback",
    "Loss",
    "MemoryPlan",
    "Metric",
    "MlxFitError",
    "ModelCheckpoint",
    "NonFiniteLossError",
    "Objective",
    "OutOfMemoryError",
    "ParameterDesyncError",
    "PeerError",
    "PeerLostError",
    "PlanMismatchError",
    "Predictions",
    "Preempted",
    "Profiler",
    "ReduceLROnPlateau",
    "RemoteLogger",
    "RendezvousError",
    "ResumeError",
    "Sums",
    "Supervised",
    "SyncPolicy",
    "TensorBoard",
    "TerminateOnNaN",
    "Timer",
    "Trainer",
    "UnknownMonitorError",
    "WorkerError",
    "__version__",
    "callbacks",
    "data",
    "datasets",
    "distributed",
    "errors",
    "find_learning_rate",
    "finetune",
    "interop",
    "lightning",
    "loggers",
    "losses",
    "metrics",
    "schedules",
    "text",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "causal_lm": ("CausalLM",),
        "checkpoint": ("CheckpointPolicy",),
        "data": ("DataLoader",),
        "distributed": ("DistributedTrainer", "SyncPolicy"),
        "dpo": ("DPO",),
        "history": ("History",),
        "losses": ("Loss",),
        "metrics": ("Metric",),
        "objective": (
            "Objective",
            "Sums",
            "Supervised",
        ),
        "plan": ("MemoryPlan",),
        "orpo": ("ORPO",),
        "runtime.device": ("DeviceConfig",),
        "trainer": ("Trainer",),
    },
    modules=(
        "callbacks",
        "data",
        "datasets",
        "distributed",
        "errors",
        "finetune",
        "interop",
        "lightning",
        "loggers",
        "losses",
        "metrics",
        "schedules",
        "text",
    ),
    packages=("callbacks",),
)
