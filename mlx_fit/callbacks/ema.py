"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_fit.callbacks.averaging import WeightAveraging
from mlx_fit.checks import boolean, natural, number
from mlx_fit.errors import ConfigurationError


class EMA(WeightAveraging):
    """Averages the weights exponentially: ``a = decay * a + (1 - decay) * w`` after each update.

    The first update's weights are copied. Updates are counted, not batches: a window of
    ``gradient_accumulation`` batches is one, a skipped update none. Trainable weights and running
    statistics are averaged, on the device; no step is traced anew.

    During ``fit`` the averages are used in validation, in weight files (``ModelCheckpoint``,
    wherever it stands in the list) and for what ``EarlyStopping`` restores. The model itself
    trains on with its raw weights and has them when ``fit`` ends; full checkpoints hold both.
    Afterwards :meth:`apply` puts the averages into the model for good, and
    ``trainer.evaluate(data, callbacks=ema)`` or ``predict`` use them for one pass.

    Another ``fit`` of the same model goes on with the averages.

    Args:
        decay: the share of the average, at least 0 and below 1.
        start_step: updates (windows of batches) of the run before averaging begins.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` for the ``n``-th state (as TensorFlow's
            ``ExponentialMovingAverage`` does), so that early weights are forgotten sooner.

    Raises:
        ConfigurationError: another callback averages the weights as well (when ``fit`` starts).

    Example:
        >>> ema = EMA(decay=0.999)
        >>> # trainer.fit(train, val, callbacks=[ema, ModelCheckpoint("best.safetensors")])
        >>> # ema.apply()
    """

    def __init__(self, decay: float = 0.999, *, start_step: int = 0, warmup: bool = False) -> None:
        super().__init__()
        self.decay = number("EMA: decay", decay, 0.0)
        if self.decay >= 1:
            raise ConfigurationError(f"EMA: decay={decay!r}; expected a number below 1.")
        self._start_step = natural("EMA: start_step", start_step)
        self._warms_up = boolean("EMA: warmup", warmup)

    def _refresh(self, epoch_is_over: bool) -> None:
        if self.trainer.step > self._start_step:
            self._take()

    def _share(self, count: mx.array) -> mx.array:
        decay: Any = mx.array(self.decay)
        if self._warms_up:
            decay = mx.minimum(decay, (1.0 + count) / (10.0 + count))
        return mx.where(count == 0, 0.0, decay)
