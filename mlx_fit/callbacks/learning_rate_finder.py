"""Which learning rates a model can be trained with: a range test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit._tree import RandomState, restore, snapshot
from mlx_fit.callbacks.base import Callback
from mlx_fit.checks import natural, number
from mlx_fit.data.loader import DataLoader
from mlx_fit.errors import ConfigurationError
from mlx_fit.protocols import Run
from mlx_fit.rates import assignable, optimizers_of, set_rate

SKIPPED_STEPS = 10  # at the beginning, where the smoothed loss has not settled


class LearningRateFinder(Callback):
    """Raises the learning rate exponentially from step to step, and notes the loss.

    The test of L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv
    1506.01186, section 3.3). Training ends after ``num_steps`` steps, or when the smoothed loss is
    ``stop_factor`` times its lowest value. Then weights, optimizer and random key are put back, bit
    for bit. :func:`find_learning_rate` also puts everything else back.

    Args:
        min_rate, max_rate: the first and the last rate.
        num_steps: steps from one to the other.
        smoothing: share of the past in the exponential mean of the loss, in [0, 1).
        stop_factor: see above; None goes on to the end.

    Attributes:
        rates: the rates tried.
        losses: the smoothed losses, corrected for their start at 0.
        suggestion: the rate where the loss falls most steeply by the logarithm of the rate; None
            where too few steps were taken, or it never falls.

    Raises:
        ConfigurationError: an argument cannot work; when ``fit`` starts: the optimizer has a
            schedule, or no learning rate.

    Example:
        >>> finder = LearningRateFinder(1e-5, 1.0, num_steps=50)
        >>> # trainer.fit(train, steps_per_epoch=50, callbacks=finder); finder.suggestion
    """

    def __init__(
        self,
        min_rate: float = 1e-7,
        max_rate: float = 1.0,
        num_steps: int = 100,
        smoothing: float = 0.9,
        stop_factor: float | None = 4.0,
    ) -> None:
        owner = "LearningRateFinder"
        self._min = number(f"{owner}: min_rate", min_rate, 1e-30)
        self._max = number(f"{owner}: max_rate", max_rate)
        if self._max <= self._min:
            raise ConfigurationError(
                f"{owner}: max_rate={max_rate!r}; expected more than min_rate={min_rate!r}."
            )
        self._num_steps = natural(f"{owner}: num_steps", num_steps, 2)
        self._smoothing = number(f"{owner}: smoothing", smoothing, 0.0, 0.999999)
        self._factor = None if stop_factor is None else number(f"{owner}: stop_factor", stop_factor)
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._mean = 0.0
        self._saved: Saved | None = None

    # --- the test ---------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any) -> None:
        """Keep the weights, the optimizer's state and the random key."""
        run = self.trainer
        assignable(run.optimizer, "LearningRateFinder")
        self.rates, self.losses, self._mean = [], [], 0.0
        self._saved = Saved(run)
        run.quiet_on_nonfinite = True  # a loss that explodes ends the test, not the program

    def on_train_batch_begin(self, batch: int, logs: Any) -> None:
        """Set the next rate, once for each window of batches."""
        run = self.trainer
        assert self._saved is not None
        done = run.step - self._saved.step
        if done < len(self.rates):
            return
        share = min(done / (self._num_steps - 1), 1.0)
        rate = self._min * (self._max / self._min) ** share
        for state in assignable(run.optimizer, "LearningRateFinder"):
            set_rate(state, rate)
        self.rates.append(rate)

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Note the loss. Reads the device."""
        run = self.trainer
        assert self._saved is not None
        if run.step - self._saved.step <= len(self.losses):
            return  # the window is still open
        # A batch whose weights are all 0 has no loss, and tells nothing.
        loss = logs.batch.get("loss", self.losses[-1] if self.losses else 0.0)
        self._mean = self._smoothing * self._mean + (1 - self._smoothing) * loss
        self.losses.append(self._mean / (1 - self._smoothing ** (len(self.losses) + 1)))
        is_over = len(self.losses) >= self._num_steps
        if is_over or not math.isfinite(loss) or self._diverges():
            run.request_stop("LearningRateFinder")

    def on_train_end(self, logs: Any) -> None:
        """Put everything back."""
        self._put_back()

    def on_exception(self, error: BaseException) -> None:
        """Put everything back."""
        self._put_back()

    def _diverges(self) -> bool:
        if self._factor is None or len(self.losses) <= SKIPPED_STEPS:
            return False
        return self.losses[-1] > self._factor * min(self.losses)

    def _put_back(self) -> None:
        if self._saved is not None:
            self._saved.restore()
            self._saved = None

    # --- the result -------------------------------------------------------------------------------

    @property
    def suggestion(self) -> float | None:
        """The rate where the smoothed loss falls most steeply by the logarithm of the rate."""
        index = self._steepest()
        return None if index is None else self.rates[index]

    def _steepest(self) -> int | None:
        losses = np.array(self.losses)
        usable = np.isfinite(losses)
        end = int(np.argmin(usable)) if not usable.all() else len(losses)
        start = min(SKIPPED_STEPS, max(end - 3, 0))  # means of few batches, lucky ones among them
        if end > start:
            # Beyond the lowest loss nothing is gained.
            end = start + int(np.argmin(losses[start:end])) + 1
        if end - start < 3:
            return None
        slopes = np.gradient(losses[start:end])  # rates are evenly spaced in their logarithm
        width = max(1, len(slopes) // 5)  # single batches are noisy: the mean over neighbours
        slopes = np.convolve(slopes, np.ones(width) / width, "same")
        return start + int(slopes.argmin()) if slopes.min() < 0 else None

    def plot(self) -> Any:
        """Loss by rate with the suggestion, as a matplotlib figure.

        Raises:
            ConfigurationError: nothing was tried yet, or matplotlib is not installed.
        """
        if not self.losses:
            raise ConfigurationError("LearningRateFinder.plot(): nothing was tried yet; fit first.")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigurationError(
                "LearningRateFinder.plot() needs matplotlib: pip install matplotlib."
            ) from error
        figure = Figure(figsize=(6, 4))
        axis = figure.subplots()
        axis.plot(self.rates[: len(self.losses)], self.losses)
        if (index := self._steepest()) is not None:
            label = f"suggestion {self.rates[index]:.2e}"
            axis.plot(self.rates[index], self.losses[index], "o", label=label)
            axis.legend()
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel("loss (smoothed)")
        figure.tight_layout()
        return figure


def find_learning_rate(
    trainer: Any,
    data: Any,
    *,
    min_rate: float = 1e-7,
    max_rate: float = 1.0,
    num_steps: int = 100,
    smoothing: float = 0.9,
    stop_factor: float | None = 4.0,
) -> LearningRateFinder:
    """Run a range test of the learning rate, and leave no trace of it.

    Afterwards weights, optimizer, random key, counters and history of the trainer are as they were,
    and a ``DataLoader`` stands where it stood: a later ``fit`` is bit for bit that of a trainer
    that never ran the test. Where the data has fewer steps, it is passed over again.

    Args:
        trainer: a :class:`~mlx_fit.Trainer`.
        data: as for ``fit``. An iterator is read, and cannot be put back.
        min_rate, max_rate, num_steps, smoothing, stop_factor: see :class:`LearningRateFinder`.

    Returns:
        The finder: its ``suggestion``, ``rates``, ``losses`` and ``plot()``.

    Example:
        >>> # finder = find_learning_rate(trainer, (x, y)); finder.suggestion
    """
    finder = LearningRateFinder(min_rate, max_rate, num_steps, smoothing, stop_factor)
    with _without_trace(trainer, data):
        trainer.fit(data, epochs=num_steps, max_steps=num_steps, callbacks=finder, verbose=0)
    return finder


@contextmanager
def _without_trace(trainer: Any, data: Any) -> Iterator[None]:
    fields, saved = dict(vars(trainer)), Saved(trainer)
    contents = {name: snapshot(value) for name, value in fields.items() if isinstance(value, dict)}
    loader = data.state_dict() if isinstance(data, DataLoader) else None
    try:
        yield
    finally:
        vars(trainer).update(fields)
        for name, content in contents.items():
            restore(fields[name], content)
        saved.restore()
        if loader is not None:
            data.load_state_dict(loader)


class Saved:
    """Weights, optimizer state and random key of a run, to be put back bit for bit.

    Holds the arrays themselves: MLX's arrays do not change, what changes is who holds them.
    """

    def __init__(self, run: Run) -> None:
        self.step = run.step
        self._model = run.model
        self._optimizers = optimizers_of(run.optimizer)
        self._weights = snapshot(run.model.state)
        self._states = [snapshot(part.state) for part in self._optimizers]
        self._initialized = [part._initialized for part in self._optimizers]
        self._key = RandomState()

    def restore(self) -> None:
        """Put them back, in place."""
        restore(self._model.state, self._weights)
        for part, state, initialized in zip(
            self._optimizers, self._states, self._initialized, strict=True
        ):
            restore(part.state, state)
            part._initialized = initialized
        self._key.restore()
        mx.eval(self._model.state, [part.state for part in self._optimizers])
