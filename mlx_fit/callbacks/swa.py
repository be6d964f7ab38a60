"""Stochastic weight averaging."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_fit.callbacks.averaging import WeightAveraging
from mlx_fit.checks import natural, number
from mlx_fit.errors import ConfigurationError
from mlx_fit.rates import assignable, set_rate


class SWA(WeightAveraging):
    """The plain mean of weights along the last part of training.

    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv
    1803.05407). Running statistics are averaged with the weights, in place of the paper's extra
    pass over the data. What the averages are used for is as with :class:`EMA`: validation, weight
    files and what ``EarlyStopping`` restores; the model has its raw weights when ``fit`` ends, and
    :meth:`apply` puts the averages into it.

    Without validation data, callbacks that save at the end of an epoch stand after this one.

    Args:
        start: the first epoch (absolute, 0-based) whose weights count, or a float below 1: the
            share of the epochs before it.
        every: ``"epoch"``: the weights at the end of each epoch; a number: every so many steps.
        learning_rate: the rate from the first such epoch on; None leaves it alone.

    Raises:
        ConfigurationError: an argument cannot work; when ``fit`` starts: another callback averages
            as well, or ``learning_rate`` is given and the optimizer has a schedule.

    Example:
        >>> swa = SWA(start=0.75, learning_rate=0.01)
    """

    def __init__(
        self,
        start: float = 0.75,
        *,
        every: int | str = "epoch",
        learning_rate: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(start, float):
            if number("SWA: start", start, 0.0) >= 1:
                raise ConfigurationError(
                    f"SWA: start={start!r}; expected an epoch (an integer) or a share below 1."
                )
        else:
            natural("SWA: start", start)
        if every != "epoch":
            natural("SWA: every", every, 1)
        self._start = start
        self._every = every
        self._rate = None
        if learning_rate is not None:
            self._rate = number("SWA: learning_rate", learning_rate, 0.0)

    @property
    def start_epoch(self) -> int:
        """The first epoch whose weights count."""
        if isinstance(self._start, float):
            return int(self._start * self.trainer.info.epochs)
        return self._start

    def on_train_batch_begin(self, batch: int, logs: Any) -> None:
        """Set the rate before the first batch that counts."""
        if batch == 0 and self._rate is not None:
            states = assignable(self.trainer.optimizer, "SWA")
            if self.trainer.epoch >= self.start_epoch:
                for state in states:
                    set_rate(state, self._rate)

    def _refresh(self, epoch_is_over: bool) -> None:
        run = self.trainer
        if run.epoch < self.start_epoch:
            return
        is_due = epoch_is_over if self._every == "epoch" else run.step % int(self._every) == 0
        if is_due:
            self._take()

    def _share(self, count: mx.array) -> mx.array:
        return count / (count + 1.0)
