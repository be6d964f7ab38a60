"""Sends a run's numbers to an experiment tracker."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mlx_fit.callbacks.as_json import as_json
from mlx_fit.callbacks.base import Callback, numbers
from mlx_fit.checks import natural
from mlx_fit.errors import ConfigurationError
from mlx_fit.loggers.base import Logger, ResumableLogger


class LoggerCallback(Callback):
    """Drives a :class:`~mlx_fit.loggers.Logger`: Weights & Biases, MLflow, or one of your own.

    The run's arguments are its config. Epochs and evaluations go under the history's keys, by the
    run's step; values by batch, which are running means, under ``batch_<key>``. Norms by layer
    become ``layer_grad_norms/<layer>``; matrices are left out. A resumed run goes on where the
    logger can (:class:`~mlx_fit.loggers.ResumableLogger`). A logger that fails while training
    runs is one warning, and training goes on; one that cannot start raises.

    Args:
        logger: any object with ``log_config``, ``log_scalars`` and ``close``.
        every: ``"epoch"``, or every so many steps, which also sends values by batch. Only then
            values are read from the device.
        config: more to tell of the run, under ``config``; plain values.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> from mlx_fit.loggers import WandbLogger
        >>> # callbacks=[LoggerCallback(WandbLogger("digits", mode="offline"), every=50)]
    """

    first_rank_only = True

    def __init__(
        self,
        logger: Logger,
        every: int | str = "epoch",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(logger, type) or not isinstance(logger, Logger):
            raise ConfigurationError(
                f"LoggerCallback: logger={logger!r}; expected an object with log_config(config), "
                "log_scalars(values, step) and close(error), such as WandbLogger()."
            )
        self.logger = logger
        self._every = 0 if every == "epoch" else natural("LoggerCallback: every", every, 1)
        self._config = dict(config or {})
        self._is_running = self._is_open = False
        self._has_warned = False
        self._evaluated: set[str] = set()
        self._last_step = 0
        if self._every:  # otherwise a batch costs nothing
            self.on_train_batch_end = self._send_batch  # type: ignore[method-assign]

    def on_train_begin(self, logs: Any) -> None:
        """A new fit; its run is opened when there is something to send, after a resume."""
        self._is_running, self._is_open, self._has_warned = True, False, False
        self._last_step = self.trainer.step

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """No evaluation yet."""
        self._evaluated = set()

    def _send_batch(self, batch: int, logs: Any) -> None:
        step = self.trainer.step
        if step % self._every == 0 and step != self._last_step:
            self._last_step = step
            self._send({f"batch_{key}": value for key, value in scalars(logs).items()})

    def on_validation_end(self, logs: Any) -> None:
        """Send an evaluation."""
        values = scalars(logs)
        self._evaluated |= values.keys()
        self._send(values)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Send the epoch, without what its evaluations have sent."""
        values = {key: v for key, v in scalars(logs).items() if key not in self._evaluated}
        self._send({"epoch": float(epoch), **values})

    def on_train_end(self, logs: Any) -> None:
        """Close the run."""
        self._open()
        self._close(None)

    def on_exception(self, error: BaseException) -> None:
        """Close the run as failed."""
        self._close(error)

    def state_dict(self) -> dict[str, Any]:
        """Which run this is, where the logger can go on with one."""
        if not self._is_running or not isinstance(self.logger, ResumableLogger):
            return {"logger": {}}
        self._open()  # the checkpoint has to name a run
        return {"logger": self.logger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that run."""
        if state["logger"] and isinstance(self.logger, ResumableLogger):
            self.logger.load_state_dict(state["logger"])

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            own = {"config": self._config} if self._config else {}
            self.logger.log_config(as_json({**self.trainer.info.arguments, **own}))

    def _send(self, values: Mapping[str, float]) -> None:
        self._open()
        try:
            self.logger.log_scalars(values, self.trainer.step)
        except Exception as error:
            self._warn(error)

    def _close(self, error: BaseException | None) -> None:
        self._is_running = False
        if self._is_open:
            self._is_open = False
            try:
                self.logger.close(error)
            except Exception as failure:
                self._warn(failure)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self.logger).__name__} failed: {error!r}. Training goes on.", stacklevel=4
            )


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among logged values, those of dicts as ``key/name``."""
    found = numbers(logs)
    for key, value in logs.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": number for name, number in numbers(value).items()}
    return found
