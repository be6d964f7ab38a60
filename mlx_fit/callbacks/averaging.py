"""Averages of the weights that stand in for them: what EMA and SWA have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import assign, named_arrays, place
from mlx_fit.callbacks.base import Callback
from mlx_fit.compiled import fused
from mlx_fit.errors import ConfigurationError
from mlx_fit.rates import optimizers_of


class WeightAveraging(Callback, ABC):
    """Averages trainable weights and running statistics while the raw weights train on.

    The averages are in the model during evaluation and prediction, and the raw weights are back
    afterwards. Arrays of half precision are averaged in float32.

    Attributes:
        num_averaged: how many states of the weights the averages are made of. Reads the device.
    """

    def __init__(self) -> None:
        self._average: dict[str, mx.array] = {}
        self._places: list[tuple[str, Any, Any]] = []
        self._count = mx.array(0.0)
        self._update_seen: mx.array | None = None
        self._step_seen = -1
        self._model: nn.Module | None = None
        self._raw: dict[str, mx.array] = {}
        self._depth = 0  # evaluations may lie inside each other
        self._is_training = False
        self._claimed = False
        self._mix: Callable[..., tuple[list[mx.array], mx.array]] = _mix

    @abstractmethod
    def _refresh(self, epoch_is_over: bool) -> None:
        """Call :meth:`_take` if the weights of now are to be averaged.

        Called after each update and at the end of each epoch, perhaps more than once.
        """

    @abstractmethod
    def _share(self, count: mx.array) -> mx.array:
        """What the average so far counts, in [0, 1]; the new weights count the rest.

        Args:
            count: states averaged so far, a scalar on the device. For 0 the share must be 0.
        """

    @property
    def num_averaged(self) -> int:
        """How many states of the weights the averages are made of. Reads the device."""
        return int(float(self._count))

    # --- averaging --------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any) -> None:
        """Stand in for the weights of this fit; go on averaging if the model is the same."""
        self._claim()
        self.trainer.averages = self
        self._is_training = True
        if self._model is not self.model:
            self._average, self._count = {}, mx.array(0.0)
        self._model = self.model
        self._mix = fused(_mix) if self.trainer.info.compiles else _mix
        self._look()

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Callbacks may freeze and thaw between epochs."""
        self._places = []

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Average after an update."""
        self._refresh(epoch_is_over=False)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Average at the end of an epoch, which may have closed a short window."""
        self._refresh(epoch_is_over=True)

    def on_train_end(self, logs: Any) -> None:
        """Stand in no longer: the model has its raw weights."""
        self.trainer.averages = None
        self._is_training = False

    def on_exception(self, error: BaseException) -> None:
        """Leave the raw weights in the model."""
        self._put_back()
        if self.trainer.averages is self:
            self.trainer.averages = None
        self._is_training = False

    def _look(self) -> None:
        """The weights of now are no news."""
        self._step_seen = self.trainer.step
        self._update_seen = optimizers_of(self.trainer.optimizer)[0].state["step"]

    def _find_places(self) -> None:
        """Where the averaged arrays are: looked up once an epoch."""
        state: Any = self.model.state
        trainable = dict(named_arrays(self.model.trainable_parameters()))
        names = [
            name
            for name, value in named_arrays(self.model.parameters())
            if mx.issubdtype(value.dtype, mx.floating)
            and (
                name in trainable
                or name in self._average
                or name.rsplit(".", 1)[-1].startswith("running_")
            )
        ]
        self._places = [(name, *place(state, name)) for name in names]
        for name, container, key in self._places:
            if name not in self._average:  # thawed since: it starts from what it is
                self._average[name] = container[key].astype(_wide(container[key].dtype))

    def _take(self) -> None:
        """Average the weights of now, unless no update was applied since the last time.

        A skipped update (``nonfinite="skip"``, weights of 0) is known to the device alone, by the
        optimizer's own count: nothing is read for it.
        """
        run = self.trainer
        if run.step == self._step_seen:
            return
        before = self._update_seen
        self._look()
        if not self._places:
            self._find_places()
        averages = [self._average[name] for name, _, _ in self._places]
        weights = [container[key] for _, container, key in self._places]
        updates = self._update_seen, before
        share = self._share(self._count)  # not compiled in: settings may change meanwhile
        averages, self._count = self._mix(averages, weights, updates, share, self._count)
        for (name, _, _), average in zip(self._places, averages, strict=True):
            self._average[name] = average  # nobody holds the old one, whose memory is reused
        mx.async_eval(averages, self._count)  # lazy, only this thread could use them

    # --- standing in ------------------------------------------------------------------------------

    def averages(self) -> dict[str, mx.array]:
        """The averaged parameters by name, in their own dtype; empty while there are none."""
        if self._is_training:
            self._refresh(epoch_is_over=False)
        now = dict(named_arrays(self.model.parameters()))
        return {name: value.astype(now[name].dtype) for name, value in self._average.items()}

    def apply(self) -> None:
        """Put the averages into the model for good, for instance after ``fit``.

        Raises:
            ConfigurationError: there are none yet.
        """
        if self._model is None or not self._average:
            raise ConfigurationError(
                f"{type(self).__name__}.apply(): nothing has been averaged yet; fit first."
            )
        now = dict(named_arrays(self._model.parameters()))
        assign(self._model, [(n, v.astype(now[n].dtype)) for n, v in self._average.items()])
        mx.eval(self._model.parameters())

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """The averages in the model inside, the raw weights again outside."""
        self._put_in()
        try:
            yield
        finally:
            self._put_back()

    def _claim(self) -> None:
        other = self.trainer.averages
        if other is not None and other is not self:
            raise ConfigurationError(
                f"{type(other).__name__} and {type(self).__name__} both average the weights of "
                "this run. Leave one of them out."
            )

    def _put_in(self) -> None:
        self._claim()
        self._depth += 1
        if self._depth > 1:
            return
        if self._model is None:
            self._model = self.model  # averages of a loaded state
        if self._model is self.model and (averages := self.averages()):
            self._claimed = self.trainer.averages is None
            self.trainer.averages = self
            mx.eval(averages)
            now = dict(named_arrays(self.model.parameters()))
            self._raw = {name: now[name] for name in averages}
            assign(self.model, averages.items())

    def _put_back(self) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0 and self._raw:
            assign(self.model, self._raw.items())
            self._raw = {}
            if self._claimed:
                self.trainer.averages, self._claimed = None, False

    def on_test_begin(self, logs: Any) -> None:
        """Evaluate the averages."""
        info = self.trainer.info
        if self._is_training and info.kind == "fit":
            self._refresh(epoch_is_over=not info.validates_inside_epochs)
        self._put_in()

    def on_test_end(self, logs: Any) -> None:
        """Put the raw weights back."""
        self._put_back()

    def on_predict_batch_begin(self, batch: int, logs: Any) -> None:
        """Predict with the averages; between batches the consumer sees the raw weights."""
        self._put_in()

    def on_predict_batch_end(self, batch: int, logs: Any) -> None:
        """Put the raw weights back."""
        self._put_back()

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The averages, and how many states they are made of."""
        if self._is_training:
            self._refresh(epoch_is_over=False)
        return {"num_averaged": self.num_averaged, "averages": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on averaging."""
        self._count = mx.array(float(state["num_averaged"]))
        self._average = dict(state["averages"])
        self._places = []
        if self._is_training:
            self._look()


def _mix(
    averages: list[mx.array],
    weights: list[mx.array],
    updates: tuple[mx.array, mx.array],
    share: mx.array,
    count: mx.array,
) -> tuple[list[mx.array], mx.array]:
    """The averages with the weights mixed in, if these are of another update; their count."""
    is_new = mx.not_equal(*updates)
    share = mx.where(is_new, share, 1.0)
    rest = mx.where(is_new, 1.0 - share, 0.0)
    mixed = [share * a + rest * w for a, w in zip(averages, weights, strict=True)]
    return mixed, count + is_new


def _wide(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype
