"""What watches a run: Keras's callbacks, by their names."""

from typing import TYPE_CHECKING

from mlx_fit._lazy import lazy

if TYPE_CHECKING:
    from mlx_fit.callbacks.base import Callback
    from mlx_fit.callbacks.csv_logger import CSVLogger
    from mlx_fit.callbacks.device_monitor import DeviceMonitor
    from mlx_fit.callbacks.early_stopping import EarlyStopping
    from mlx_fit.callbacks.ema import EMA
    from mlx_fit.callbacks.freeze_until import FreezeUntil
    from mlx_fit.callbacks.gradient_monitor import GradientMonitor
    from mlx_fit.callbacks.json_logger import JSONLogger
    from mlx_fit.callbacks.lambda_callback import LambdaCallback
    from mlx_fit.callbacks.learning_rate_finder import LearningRateFinder, find_learning_rate
    from mlx_fit.callbacks.learning_rate_scheduler import LearningRateScheduler
    from mlx_fit.callbacks.logger_callback import LoggerCallback
    from mlx_fit.callbacks.model_checkpoint import ModelCheckpoint
    from mlx_fit.callbacks.predictions import Predictions
    from mlx_fit.callbacks.profiler import Profiler
    from mlx_fit.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
    from mlx_fit.callbacks.remote_logger import RemoteLogger
    from mlx_fit.callbacks.swa import SWA
    from mlx_fit.callbacks.tensorboard import TensorBoard
    from mlx_fit.callbacks.terminate_on_nan import TerminateOnNaN
    from mlx_fit.callbacks.timer import Timer


__all__ = [
    "EMA",
    "SWA",
    "CSVLogger",
    "Callback",
    "DeviceMonitor",
    "EarlyStopping",
    "FreezeUntil",
    "GradientMonitor",
    "JSONLogger",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateScheduler",
    "LoggerCallback",
    "ModelCheckpoint",
    "Predictions",
    "Profiler",
    "ReduceLROnPlateau",
    "RemoteLogger",
    "TensorBoard",
    "TerminateOnNaN",
    "Timer",
    "find_learning_rate",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "base": ("Callback",),
        "csv_logger": ("CSVLogger",),
        "device_monitor": ("DeviceMonitor",),
        "early_stopping": ("EarlyStopping",),
        "ema": ("EMA",),
        "freeze_until": ("FreezeUntil",),
        "gradient_monitor": ("GradientMonitor",),
        "json_logger": ("JSONLogger",),
        "lambda_callback": ("LambdaCallback",),
        "learning_rate_finder": (
            "LearningRateFinder",
            "find_learning_rate",
        ),
        "learning_rate_scheduler": ("LearningRateScheduler",),
        "logger_callback": ("LoggerCallback",),
        "model_checkpoint": ("ModelCheckpoint",),
        "predictions": ("Predictions",),
        "profiler": ("Profiler",),
        "reduce_lr_on_plateau": ("ReduceLROnPlateau",),
        "remote_logger": ("RemoteLogger",),
        "swa": ("SWA",),
        "tensorboard": ("TensorBoard",),
        "terminate_on_nan": ("TerminateOnNaN",),
        "timer": ("Timer",),
    },
)
