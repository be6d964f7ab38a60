"""Modules written as for Lightning: ``training_step``, ``configure_optimizers``, ``self.log``.

The module is an ``mlx.nn`` one; :func:`lightning_trainer` makes the trainer that runs it, and
:func:`loaders` the loaders of a data module.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.data.data_module import fit_loaders
from mlx_fit.errors import ConfigurationError
from mlx_fit.habits import REPLACED
from mlx_fit.trainer import Trainer

__all__ = ["LightningModule", "lightning_trainer", "loaders"]


_CALLBACK = "give fit a callback (mlx_fit.callbacks.Callback) instead"
_LOADER = "give its data to fit, evaluate or predict instead"
# What Lightning would call and this adapter does not, and what takes its place.
_NEVER_CALLED = {
    "test_step": "evaluate(data) calls validation_step; test_step = validation_step is fine",
    "predict_step": "predict(data) calls forward",
    "optimizer_step": "the trainer updates the weights",
    "optimizer_zero_grad": "gradients are made anew for every update",
    "backward": "the trainer differentiates the loss",
    "configure_gradient_clipping": "give clip_norm= or clip_value= to lightning_trainer",
    "lr_scheduler_step": "give the optimizer a schedule, or fit a callback",
    "configure_callbacks": "give callbacks= to fit",
    "configure_model": "make the layers in __init__",
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader"), _LOADER),
    **dict.fromkeys(("predict_dataloader", "prepare_data", "setup"), _LOADER),
}
_HOOK = re.compile(
    r"on_((fit|train|validation|test|predict|sanity_check)_|before_|after_|save_|load_)"
)
_FOR_EVER = "a step is compiled and would see its first value for ever; write a callback instead"
# Attributes that Lightning gives a module, and what takes their place.
_NOT_HERE = {
    "save_hyperparameters": "set what you need as attributes, as self.width = width",
    "hparams": "set what you need as attributes, as self.width = width",
    "trainer": "lightning_trainer(module) makes it; callbacks get it as self.trainer",
    "current_epoch": _FOR_EVER,
    "global_step": _FOR_EVER,
    "logger": "give fit a callback such as TensorBoard; self.log(name, value) logs a scalar",
    "lr_schedulers": "give the optimizer a schedule, or fit a callback",
    "load_from_checkpoint": "make the module, then Trainer.load(folder) or load_weights(file)",
}
# Options of Lightning's log that ask for what happens anyhow.
_FULFILLED = {"prog_bar": True, "logger": True, "on_epoch": True, "on_step": False}


class _Log:
    """What a step logged; no dict, which ``nn.Module`` would take for parameters."""

    def __init__(self) -> None:
        self.values: dict[str, mx.array] | None = None


class LightningModule(nn.Module, ABC):
    """An ``mlx.nn`` model that brings its own steps and optimizer.

    ``forward`` may be defined instead of ``__call__``. Steps are compiled: they see shapes, not
    values, and their ``batch_idx``, where they take one, is None.

    Example:
        >>> import mlx.nn as nn, mlx.optimizers as optim, numpy as np
        >>> from mlx_fit.lightning import LightningModule, lightning_trainer
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(2, 1)
        ...     def forward(self, x):
        ...         return self.fc(x)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         loss = nn.losses.mse_loss(self(x), y)
        ...         self.log("train_loss", loss)
        ...         return loss
        ...     def configure_optimizers(self):
        ...         return optim.SGD(0.1)
        >>> x = np.ones((8, 2), np.float32)
        >>> history = lightning_trainer(Line()).fit((x, x[:, :1]), epochs=2, verbose=0)
        >>> sorted(history.history)
        ['learning_rate', 'loss', 'train_loss']
    """

    def __init__(self) -> None:
        super().__init__()
        self._log = _Log()

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: None) -> Any:
        """The mean loss of a batch, or a dict with ``"loss"``."""

    @abstractmethod
    def configure_optimizers(self) -> Any:
        """An MLX optimizer, a list of one, or a dict with ``"optimizer"``."""

    def validation_step(self, batch: Any, batch_idx: None) -> Any:
        """As ``training_step``, with nothing updated; it may only log ``val_loss``."""
        return self.training_step(batch, batch_idx)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for inputs: what ``predict`` gives."""
        raise ConfigurationError(
            f"{type(self).__name__} has no forward(), which predict and self(x) call. Define "
            "forward(self, x), or call a layer of the module instead."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_HERE and name not in self:
            raise AttributeError(
                f"{type(self).__name__} has no .{name} as in Lightning: {_NOT_HERE[name]}.",
                name=name,
                obj=self,
            )
        return super().__getattr__(name)

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Log a scalar: its mean over the epoch, weighed by rows, is in the history.

        In validation a name's leading ``val_`` is dropped, as the history adds it.

        Raises:
            ConfigurationError: called outside of a step, without a name, or with options, but
                for those of Lightning that ask for just this: ``prog_bar=True``, ``logger=True``,
                ``on_epoch=True``, ``on_step=False``.
        """
        if others := [key for key in options if _FULFILLED.get(key) is not options[key]]:
            raise ConfigurationError(
                f"self.log({name!r}, ..., {', '.join(f'{k}={options[k]!r}' for k in others)}): "
                "every value that is logged is averaged over the epoch's rows and shown; leave "
                "the options out."
            )
        if self._log.values is None:
            raise ConfigurationError(f"self.log({name!r}, ...) was called outside of a step.")
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"self.log({name!r}, ...): expected a name.")
        self._log.values[name] = mx.stop_gradient(mx.array(value))

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """Log several scalars."""
        for name, value in values.items():
            self.log(name, value, **options)


def lightning_trainer(module: LightningModule, **options: Any) -> Trainer:
    """The trainer of a module that brings its own steps.

    Args:
        module: the module.
        options: as for :class:`~mlx_fit.Trainer`, but optimizer, loss, metrics and objective.

    Raises:
        ConfigurationError: the module is none, gives no single MLX optimizer, or has methods that
            Lightning calls and nothing here does.
    """
    if not isinstance(module, LightningModule):
        raise ConfigurationError(
            f"module is a {type(module).__name__}; expected a mlx_fit.lightning.LightningModule: "
            "an mlx.nn model with training_step and configure_optimizers. A module of lightning "
            "itself holds torch tensors; its weights go over with interop.torch.load_weights."
        )
    if given := {"optimizer", "loss", "metrics", "objective"} & set(options):
        raise ConfigurationError(f"{sorted(given)} come from the module; leave them out.")
    _refuse_hooks(module)
    return Trainer(module, _optimizer(module.configure_optimizers()), objective=_step, **options)


def _refuse_hooks(module: LightningModule) -> None:
    """Raise for what would silently never run."""
    kind = type(module)
    for name in dir(kind):
        remedy = _NEVER_CALLED.get(name) or (_CALLBACK if _HOOK.match(name) else None)
        if remedy is None or getattr(kind, name) is kind.validation_step:
            continue
        raise ConfigurationError(f"{kind.__name__}.{name} would never be called: {remedy}.")
    if getattr(module, "automatic_optimization", True) is not True:
        raise ConfigurationError(
            f"{kind.__name__}.automatic_optimization is False; a step returns its loss here, and "
            "the trainer updates the weights. For another update write a loop over "
            "Trainer.train_on_batch."
        )


def _optimizer(given: Any) -> optim.Optimizer:
    if isinstance(given, Mapping):
        if extra := set(given) - {"optimizer"}:
            raise _scheduled(sorted(extra))
        given = given.get("optimizer")
    if isinstance(given, (tuple, list)):
        if len(given) == 2 and isinstance(given[0], (tuple, list)):
            given, schedulers = given
            if schedulers:
                raise _scheduled("schedulers")
        if len(given) != 1:
            raise ConfigurationError(
                f"configure_optimizers returned {len(given)} optimizers; a step has one loss and "
                "one update. For parts of a model use interop.torch.param_groups, which gives one."
            )
        given = given[0]
    if not isinstance(given, optim.Optimizer):
        raise ConfigurationError(
            f"configure_optimizers returned a {type(given).__name__}; expected an MLX optimizer, "
            "such as mlx_fit.interop.torch.optimizers.Adam(lr=1e-3)."
        )
    return given


def _scheduled(what: Any) -> ConfigurationError:
    return ConfigurationError(
        f"configure_optimizers returned {what} besides the optimizer. A schedule is the learning "
        "rate itself: optim.Adam(mlx_fit.schedules.warmup_cosine(...)); for ReduceLROnPlateau and "
        "rates by epoch give fit the callbacks ReduceLROnPlateau or LearningRateScheduler."
    )


def _step(module: LightningModule, batch: Any) -> Any:
    """The objective: the module's step for its mode, and what it logged."""
    step = module.training_step if module.training else module.validation_step
    with _logging(module) as logged:
        result = _explained(step, batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not module.training:
        logged = {name.removeprefix("val_"): value for name, value in logged.items()}
    named = logged.pop("loss", None)
    loss = named if loss is None and not module.training else loss
    if loss is None:
        name = "training_step" if module.training else "validation_step"
        raise ConfigurationError(
            f"{type(module).__name__}.{name} returned no loss"
            + (". Return it." if module.training else " and logged no 'val_loss'. Do either.")
        )
    return loss, logged


@contextmanager
def _logging(module: LightningModule) -> Iterator[dict[str, mx.array]]:
    found: dict[str, mx.array] = {}
    module._log.values = found
    try:
        yield found
    finally:
        module._log.values = None


def _explained(step: Any, batch: Any) -> Any:
    takes_index = len(inspect.signature(step).parameters) > 1
    try:
        return step(batch, None) if takes_index else step(batch)
    except AttributeError as error:
        remedy = REPLACED.get(error.name or "")
        if remedy is None:
            raise
        raise ConfigurationError(
            f"{step.__qualname__} uses .{error.name}, which MLX does not have: {remedy}."
        ) from error


def loaders(datamodule: Any) -> tuple[Any, Any]:
    """The training and validation loaders of a Lightning data module, which ``fit`` takes itself.

    Calls ``prepare_data()``, ``setup("fit")``, ``train_dataloader()`` and ``val_dataloader()``,
    those that it has. Several validation loaders become a dict of sets.

    Args:
        datamodule: any object with ``train_dataloader``.

    Returns:
        ``(train, val)``; ``val`` is None where there is none.

    Raises:
        DataError: it has no ``train_dataloader``.
    """
    return fit_loaders(datamodule)
