"""Lower the learning rate when a value no longer improves."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.monitor import Monitor
from mlx_fit.checks import natural, number
from mlx_fit.errors import ConfigurationError
from mlx_fit.rates import assignable, rate_of, set_rate


class ReduceLROnPlateau(Callback):
    """Multiplies the learning rate by ``factor`` after ``patience`` judgements without improvement.

    The arithmetic is Keras's. ``history.history["learning_rate"]`` holds the rate of an epoch's
    last update, before it was lowered at the epoch's end. With several optimizers
    (``MultiOptimizer``) each rate is lowered.

    Args:
        monitor: key in the logs.
        factor: what the rate is multiplied by, at least 0 and below 1.
        patience: how many judgements (epochs, or evaluations inside epochs) without improvement
            lower the rate; 0 is the same as 1.
        verbose: 1 prints a line when the rate is lowered.
        mode: ``"min"``, ``"max"``, or ``"auto"``, the metric's own direction.
        min_delta: smallest change that counts as an improvement over the best.
        cooldown: judgements after a cut that do not count.
        min_lr: the rate is not lowered below this.

    Attributes:
        best: the best value so far, None before the first.
        wait: judgements since the last improvement or cut.
        num_reductions: how often the rate was lowered in this fit.

    Raises:
        ConfigurationError: when ``fit`` starts: the optimizer has a schedule, or no learning rate.

    Example:
        >>> callback = ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=3, min_lr=1e-6)
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        owner = "ReduceLROnPlateau"
        self.monitor = monitor
        self.factor = number(f"{owner}: factor", factor, 0.0)
        if self.factor >= 1:
            raise ConfigurationError(f"{owner}: factor={factor!r}; expected a number below 1.")
        self.patience = natural(f"{owner}: patience", patience)
        self.cooldown = natural(f"{owner}: cooldown", cooldown)
        self.min_lr = number(f"{owner}: min_lr", min_lr, 0.0)
        self.best: float | None = None
        self.wait = 0
        self.num_reductions = 0
        self._monitor = Monitor(monitor, mode, owner, min_delta)
        self._verbose = verbose
        self._cooldown_left = 0

    def on_train_begin(self, logs: Any) -> None:
        """Start over."""
        assignable(self.trainer.optimizer, "ReduceLROnPlateau")
        self._monitor.start()
        self.best = None
        self.wait = self._cooldown_left = self.num_reductions = 0

    def on_validation_end(self, logs: Any) -> None:
        """Judge an evaluation inside an epoch."""
        self._judge(self.trainer.epoch, self._monitor.after_validation(self.trainer, logs))

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Judge an epoch."""
        self._judge(epoch, self._monitor.at_epoch_end(self.trainer, logs))

    def _judge(self, epoch: int, value: float | None) -> None:
        if value is None:
            return
        if self._cooldown_left:
            self._cooldown_left -= 1
            self.wait = 0
        if self._monitor.improves(self.trainer, value, self.best):
            self.best, self.wait = value, 0
        elif not self._cooldown_left:
            self.wait += 1
            if self.wait >= self.patience:
                self._reduce(epoch)

    def _reduce(self, epoch: int) -> None:
        lowered = False
        for state in assignable(self.trainer.optimizer, "ReduceLROnPlateau"):
            old = rate_of(state)
            if old <= np.float32(self.min_lr):  # rates are float32
                continue
            new = max(old * self.factor, self.min_lr)
            set_rate(state, new)
            lowered = True
            if self._verbose:
                print(f"Epoch {epoch + 1}: ReduceLROnPlateau reducing learning rate to {new:g}.")
        if lowered:
            self.num_reductions += 1
            self._cooldown_left, self.wait = self.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """The best value, the wait and the cooldown; the rate is in the optimizer's state."""
        return {
            "best": self.best,
            "wait": self.wait,
            "cooldown_left": self._cooldown_left,
            "num_reductions": self.num_reductions,
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting; ``patience`` and ``factor`` given now win."""
        self.best, self.wait = state["best"], state["wait"]
        self._cooldown_left = state["cooldown_left"]
        self.num_reductions = state["num_reductions"]
        self._monitor.load_state_dict(state["monitor"])
