"""mlx_fit: Keras-style training for Apple's MLX, with PyTorch ergonomics.

    trainer = Trainer(model, optimizer, loss="cross_entropy", metrics=["accuracy"])
    history = trainer.fit((x, y), val, epochs=10, callbacks=[EarlyStopping(patience=3)])

Every public name is listed in ``__all__``.
"""

# NumPy comes before the BLAS, whose threads spin for a while and would make its import slower.
import numpy as _numpy  # noqa: F401

# On Linux a fast BLAS has to be loaded before mlx.core is; everything below imports mlx.core.
from mlx_fit.runtime import blas as _blas

_blas.preload()

from mlx_fit import callbacks, data, datasets, errors, losses, metrics, schedules, text
from mlx_fit._version import __version__
from mlx_fit.callbacks import (
    Callback,
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    TensorBoard,
    TerminateOnNaN,
)
from mlx_fit.checkpoint import CheckpointPolicy
from mlx_fit.data import DataLoader
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
    PeerError,
    PeerLostError,
    PlanMismatchError,
    Preempted,
    RendezvousError,
    ResumeError,
    UnknownMonitorError,
)
from mlx_fit.history import History
from mlx_fit.losses import Loss
from mlx_fit.metrics import Metric
from mlx_fit.objective import Objective, Sums, Supervised
from mlx_fit.runtime.device import DeviceConfig
from mlx_fit.trainer import Trainer

__all__ = [
    "CSVLogger",
    "Callback",
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
    "DistributedError",
    "EarlyStopping",
    "History",
    "LambdaCallback",
    "Loss",
    "Metric",
    "MlxFitError",
    "ModelCheckpoint",
    "NonFiniteLossError",
    "Objective",
    "OutOfMemoryError",
    "PeerError",
    "PeerLostError",
    "PlanMismatchError",
    "Preempted",
    "RendezvousError",
    "ResumeError",
    "Sums",
    "Supervised",
    "TensorBoard",
    "TerminateOnNaN",
    "Trainer",
    "UnknownMonitorError",
    "__version__",
    "callbacks",
    "data",
    "datasets",
    "errors",
    "losses",
    "metrics",
    "schedules",
    "text",
]
