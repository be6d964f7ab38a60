"""Checks and small conversions of what the trainer's methods are given."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.checks import natural, path_of
from mlx_fit.communicator import ALONE
from mlx_fit.data.arrays import is_array
from mlx_fit.data.data_module import fit_loaders, is_data_module, loader_for
from mlx_fit.data.feed import Replay
from mlx_fit.data.sources import Source, as_source, split_rows
from mlx_fit.data.split import EvaluatedSource, split_over
from mlx_fit.errors import ConfigurationError
from mlx_fit.protocols import Communicator
from mlx_fit.runtime.device import DeviceConfig
from mlx_fit.timing import Schedule

STATE_KEYS = (
    "model",
    "buffers",
    "optimizer",
    "loss_scale",
    "random_key",
    "step",
    "epoch",
    "order_seed",
    "num_passes",
)


def split_validation(train: Any, val: Any, fraction: float) -> tuple[Any, Any]:
    """Training and validation data of ``fit``, the latter split off where asked for."""
    if isinstance(train, nn.Module) or callable(getattr(train, "named_parameters", None)):
        raise ConfigurationError(
            f"fit(model, loader) got the model {type(train).__name__}, as Lightning's fit does; "
            "here the trainer has its model. Write Trainer(model, optimizer, ...).fit(loader, val)."
        )
    if is_data_module(train):
        train, own = fit_loaders(train)
        val = own if val is None else val
    if _is_array(train) and _is_array(val):
        raise ConfigurationError(
            "fit(x, y) got two arrays: the second argument is validation data. Write "
            "fit((x, y)), with the pair in one tuple."
        )
    if not isinstance(fraction, Real) or not 0.0 <= float(fraction) < 1.0:
        raise ConfigurationError(f"validation_split={fraction!r}; expected 0 <= share < 1.")
    if fraction and val is None:
        return split_rows(train, fraction)
    return train, val


def _is_array(data: Any) -> bool:
    """Whether data is one array; an empty list is the batches of a rank that has none."""
    return is_array(data) and not (isinstance(data, list) and not data)


def check_trainer(
    model: Any, optimizer: Any, batch_size: Any, device_config: Any, seed: Any
) -> None:
    """Raise for what a trainer cannot be made of."""
    for name, value in (("model", model), ("optimizer", optimizer)):
        if isinstance(value, type):
            raise ConfigurationError(
                f"{name} is the class {value.__name__}; make an object: {value.__name__}(...)."
            )
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"model is {type(model).__name__}; expected an mlx.nn.Module. The weights of a torch "
            "module must be copied into an mlx.nn model first."
        )
    if type(optimizer).__module__.startswith("torch.optim"):
        raise ConfigurationError(
            f"optimizer is PyTorch's {type(optimizer).__name__}, which cannot update MLX arrays. "
            "Use an MLX one: mlx_fit.interop.torch.optimizers has SGD, Adam, AdamW and RMSprop "
            "with PyTorch's arguments and arithmetic; param_groups makes groups."
        )
    if optimizer is not None and not isinstance(optimizer, optim.Optimizer):
        raise ConfigurationError(
            f"optimizer is {optimizer!r}; expected an MLX optimizer, such as "
            "mlx.optimizers.AdamW(learning_rate=1e-3)."
        )
    if device_config is not None and not isinstance(device_config, DeviceConfig):
        raise ConfigurationError(
            f"device_config={device_config!r}; expected a DeviceConfig, such as "
            'DeviceConfig(device="gpu").'
        )
    natural("batch_size", batch_size, 1)
    if seed is not None:
        natural("seed", seed)


def evaluation_source(
    data: Any,
    batch_size: int,
    name: str = "data",
    ranks: Communicator = ALONE,
    stage: str = "test",
) -> Source:
    """Data for evaluation or prediction: in order, never shuffled.

    ``stage`` is what a data module is asked for: ``"validate"``, ``"test"`` or ``"predict"``.
    """
    size = natural("batch_size", batch_size, 1)
    if is_data_module(data):
        data = loader_for(data, stage)
    source = as_source(
        data,
        batch_size=size,
        shuffle=False,
        seed=0,
        name=name,
        may_be_empty=ranks.size > 1,
    )
    return split_over(source, ranks, EvaluatedSource)


def validation_sets(
    val: Any, schedule: Schedule, batch_size: int, ranks: Communicator = ALONE
) -> dict[str, Replay]:
    """The validation sets of ``fit`` by name; the name is ``""`` for a single one."""
    if val is None:
        if schedule.validation_steps is not None or schedule.validation_freq != 1:
            raise ConfigurationError(
                "validation_steps and validation_freq need validation data: give val= or "
                "validation_split=."
            )
        return {}
    sets = val if isinstance(val, dict) else {"": val}
    if arrays := [name for name, data in sets.items() if name and _is_array(data)]:
        raise ConfigurationError(
            "val is a dict, which means several validation sets, but "
            f"val[{arrays[0]!r}] is one array without targets. Write val=(x, y), or "
            "val={'name': (x, y), ...}."
        )
    steps = schedule.validation_steps
    return {
        name: Replay(
            evaluation_source(
                data, batch_size, f"val[{name!r}]" if name else "val", ranks, stage="validate"
            ),
            steps,
        )
        for name, data in sets.items()
    }


def checked_steps(steps: Any) -> int | None:
    """The ``steps`` of an evaluation or prediction: None, or at least one batch."""
    return None if steps is None else natural("steps", steps, 1)


def check_state_dict(state: Any) -> None:
    """Raise unless ``state`` has what ``Trainer.state_dict`` gives."""
    missing = [key for key in STATE_KEYS if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ConfigurationError(
            f"This is not what Trainer.state_dict() gives: {', '.join(missing)} missing. For "
            "weights alone use load_weights(path), or model.update."
        )


def as_batch(x: Any, y: Any, weights: Any) -> Any:
    """One batch from separate arguments."""
    if weights is not None:
        return (x, y, weights)
    return x if y is None else (x, y)


def weights_path(path: str | Path) -> Path:
    """The path of a weights file.

    Raises:
        ConfigurationError: it has another suffix than ``.safetensors``.
    """
    path = path_of("path", path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(
            f"{path} has the suffix {path.suffix!r}; weights are written as .safetensors."
        )
    return path


def folder_path(path: str | Path) -> Path:
    """The path of a checkpoint folder.

    Raises:
        ConfigurationError: it is no path, or that of a weights file.
    """
    path = path_of("path", path)
    if path.suffix == ".safetensors":
        raise ConfigurationError(
            f"{path} is the name of a weights file, and everything goes into a folder. For weights "
            "alone use save_weights and load_weights."
        )
    return path
