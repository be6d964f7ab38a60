"""Stop when a value no longer improves."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_fit._tree import assign
from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.monitor import Monitor
from mlx_fit.checks import boolean, natural, number
from mlx_fit.state import judged_weights


class EarlyStopping(Callback):
    """Stops training when a monitored value has not improved for a while.

    Args:
        monitor: key in the logs.
        min_delta: smallest change that counts as an improvement over the last accepted best.
        patience: how many judgements (epochs, or evaluations inside epochs) without improvement
            are borne; 0 stops at the first. Never stops at the first judgement.
        mode: ``"min"``, ``"max"``, or ``"auto"``, the metric's own direction.
        baseline: the wait only starts over for values that beat this one as well.
        restore_best_weights: at any normal end of the fit put the best epoch's weights back. With
            :class:`EMA` or :class:`SWA` these are the averages, which were what was judged.
        start_from_epoch: epochs (0-based) before this one are not judged.
        verbose: 1 prints why and when it stopped.

    Attributes:
        best, best_epoch: the best value and its epoch (0-based), None before the first.
        stopped_epoch: the epoch that ended the fit, None if another reason did.
        wait: judgements since the last improvement.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
        verbose: int = 0,
    ) -> None:
        owner = "EarlyStopping"
        self.monitor = monitor
        self.patience = natural(f"{owner}: patience", patience)
        self.baseline = None if baseline is None else number(f"{owner}: baseline", baseline)
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch: int | None = None
        self.wait = 0
        self._monitor = Monitor(monitor, mode, owner, min_delta)
        self._restores = boolean(f"{owner}: restore_best_weights", restore_best_weights)
        self._start_from_epoch = natural(f"{owner}: start_from_epoch", start_from_epoch)
        self._verbose = verbose
        self._num_judged = 0
        self._best_weights: dict[str, mx.array] = {}

    def on_train_begin(self, logs: Any) -> None:
        """Start over."""
        self._monitor.start()
        self.best = self.best_epoch = self.stopped_epoch = None
        self.wait = self._num_judged = 0
        self._best_weights = {}

    def on_validation_end(self, logs: Any) -> None:
        """Judge an evaluation inside an epoch."""
        self._judge(self.trainer.epoch, self._monitor.after_validation(self.trainer, logs))

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Judge an epoch."""
        self._judge(epoch, self._monitor.at_epoch_end(self.trainer, logs))

    def on_train_end(self, logs: Any) -> None:
        """Put the best weights back."""
        if self._best_weights:
            assign(self.model, self._best_weights.items())
            if self._verbose:
                print(
                    f"Restoring model weights from the best epoch: {self._number(self.best_epoch)}."
                )

    def _judge(self, epoch: int, value: float | None) -> None:
        if value is None or epoch < self._start_from_epoch:
            return
        run = self.trainer
        self._num_judged += 1
        self.wait += 1
        if self._monitor.improves(run, value, self.best):
            self.best, self.best_epoch = value, epoch
            if self._restores:
                # References to copies: what a later update or the user does leaves them alone.
                self._best_weights = {k: mx.array(v) for k, v in judged_weights(run).items()}
                mx.eval(self._best_weights)  # lazy copies would belong to this thread
            if self.baseline is None or self._monitor.improves(run, value, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and self._num_judged > 1:
            self.stopped_epoch = epoch
            run.request_stop("EarlyStopping")
            if self._verbose:
                print(f"Epoch {self._number(epoch)}: early stopping")

    @staticmethod
    def _number(epoch: int | None) -> int:
        return 0 if epoch is None else epoch + 1

    def state_dict(self) -> dict[str, Any]:
        """The wait, the best value and the best weights."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "wait": self.wait,
            "num_judged": self._num_judged,
            "stopped_epoch": self.stopped_epoch,
            "best_weights": dict(self._best_weights),
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting; a ``patience`` given now wins over the one that was saved."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.wait, self._num_judged = state["wait"], state["num_judged"]
        self._best_weights = dict(state["best_weights"])
        self._monitor.load_state_dict(state["monitor"])
        if state["stopped_epoch"] is not None and self.wait >= self.patience:
            self.stopped_epoch = state["stopped_epoch"]
            self.trainer.request_stop("EarlyStopping")
