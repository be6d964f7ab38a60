"""What watches a run: Keras's callbacks, by their names."""

from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.csv_logger import CSVLogger
from mlx_fit.callbacks.early_stopping import EarlyStopping
from mlx_fit.callbacks.lambda_callback import LambdaCallback
from mlx_fit.callbacks.model_checkpoint import ModelCheckpoint
from mlx_fit.callbacks.tensorboard import TensorBoard
from mlx_fit.callbacks.terminate_on_nan import TerminateOnNaN

__all__ = [
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "LambdaCallback",
    "ModelCheckpoint",
    "TensorBoard",
    "TerminateOnNaN",
]
