"""Where a training step is in its epoch: what it counts, what is under way, and how to go back.

Imports layer 2: communicator, compiled, options.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit._tree import named_arrays, snapshot
from mlx_fit.communicator import Exchange
from mlx_fit.compiled import evaluate_again
from mlx_fit.errors import NonFiniteLossError, non_finite_loss
from mlx_fit.logs import Sums
from mlx_fit.options import StepOptions
from mlx_fit.trainable import load_window

_WEIGHT = "1"  # name of the weight in a window [gradients, weight, number of bad ones]


class StepState(ABC):
    """What a training step keeps between batches beside model, optimizer and loss scale.

    Args:
        model: the model.
        options: how a batch becomes an update.
        exchange: puts windows together with those of other ranks, or None.

    Attributes:
        sums: what the epoch has added up so far.
        window_open: whether batches wait for their update.
        num_windows: windows closed so far.
        num_batches: batches taken in this epoch.
        num_skipped: windows of total weight 0 that were not even dispatched, in this epoch.
        learning_rate: the rate of the newest update, before anybody changes it; on the device.
        is_whole: False while a batch is under way, and for good if computing it failed: weights
            and optimizer may then be half updated.
        norms_every: updates from one whose norms by layer are logged to the next; 0: none are.
        is_partial: whether what is taken is a part of a batch; :meth:`end_batch` ends the batch.
        before_closing: called before anything of a window is sent to other ranks, or None.
    """

    def __init__(self, model: nn.Module, options: StepOptions, exchange: Exchange | None) -> None:
        self.model = model
        self.options = options
        self.exchange = exchange
        self.sums = Sums()
        self.window_open = False
        self.num_windows = 0
        self.num_skipped = 0
        self.num_batches = 0
        self.learning_rate: mx.array | None = None
        self.is_whole = True
        self.norms_every = 0
        self.is_partial = False
        self.before_closing: Callable[[], None] | None = None
        self._state: list[Any] = []
        self._scaling: dict[str, mx.array] = {}  # of the loss; empty where it is not scaled
        self._is_fused = options.gradient_accumulation == 1 and exchange is None
        self._last_batch: int | None = None
        self._first_window = 0  # windows before this epoch
        self._window: list[Any] = []
        self._num_in_window = 0
        self._has_begun = exchange is None  # whether the other ranks know of this window
        self._loaded_weight = 0.0  # of all ranks, in a window that a checkpoint held
        self._gradients_of_batch: list[Any] = []  # kept apart where they may have to be redone
        # Vectors by the steps that were dispatched, and by the newest that is finished.
        self._in_flight: deque[int] = deque()
        self._settled: int | None = None
        self._awaited: int | None = None  # on the CPU: by the one that was dispatched
        is_cpu = mx.default_device().type == mx.DeviceType.cpu
        self._is_async = not is_cpu and exchange is None
        # On the CPU the next batch is made a graph meanwhile, but no second step begins: it would
        # be no faster, and hold another copy of the state. What may be redone is waited for.
        self._overlaps = is_cpu and options.on_oom != "split"

    @abstractmethod
    def close_window(self) -> None:
        """Update the weights from the accumulated batches of the window, however many there are."""

    @abstractmethod
    def settle(self) -> None:
        """Start to evaluate what this step changed, and wait for what should be done by now."""

    def _count_anew(self, num_batches: int | None) -> None:
        """An epoch begins, of so many batches, or None where that is not known."""
        self.sums.restart()
        self.num_batches = self.num_skipped = 0
        self._last_batch, self._first_window = num_batches, self.num_windows
        self._settled = None

    def wait(self) -> None:
        """On the CPU: wait for the newest step, of which the device may still compute the rest.

        It cannot be done by evaluating the state: the next step may stand there by now, lazily.
        """
        if self._awaited is not None:
            self.is_whole = False
            mx.synchronize()  # host synchronisation, the one of a step
            self._settled, self._awaited = self._awaited, None
            self.is_whole = True

    @property
    def norms_now(self) -> bool | None:
        """Whether the norms of the next update are measured; None: none are logged at all."""
        return (self.num_windows + 1) % self.norms_every == 0 if self.norms_every else None

    @property
    def waits_at_once(self) -> bool:
        """Whether no step begins before the one before it is finished, as on the CPU."""
        return not self._is_async

    @property
    def is_under_way(self) -> bool:
        """Whether the device may still compute a step, and fail."""
        return self._awaited is not None or bool(self._in_flight)

    def drain(self) -> None:
        """Wait for every step that is in flight."""
        self.wait()
        self._in_flight.clear()
        self._settled = self.sums.num_added
        self.sums.fold()  # host synchronisation, once an epoch

    @property
    def first_bad(self) -> tuple[int, float] | None:
        """Window (1-based) and value of the first loss that was not finite, or None.

        Of this epoch's steps that the device has finished; it waits for none.
        """
        return None if self._settled is None else self.sums.first_bad(self._settled)

    def bad_loss(self, number: int, epoch: int) -> NonFiniteLossError:
        """The error for a step with a non-finite loss, or with a loss scale that ran out."""
        _, loss = self.first_bad or (0, math.nan)
        return non_finite_loss(number, epoch, loss, scales_loss=bool(self._scaling))

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is, for a checkpoint; see also :meth:`open_window`. Synchronises."""
        rate = self.learning_rate
        return {
            "num_windows": self.num_windows,
            "num_batches": self.num_batches,
            "num_in_window": self._num_in_window,
            "num_skipped": self.num_skipped,
            "first_window": self._first_window,
            "learning_rate": None if rate is None else float(np.array(rate)),
        }

    def open_window(self) -> dict[str, mx.array]:
        """The arrays of a window that waits for its update, by name; empty between windows."""
        return dict(named_arrays(self._window))

    def joined_statistics(self) -> dict[str, mx.array]:
        """Inside a window of several ranks: the running statistics of all of them, by name."""
        if self.exchange is None or not self.window_open:
            return {}
        return self.exchange.statistics(self.model, self._window)

    def load_state_dict(
        self,
        state: dict[str, Any],
        sums: dict[str, Any] | None,
        window: dict[str, mx.array],
        is_first: bool = True,
    ) -> None:
        """Go on inside an epoch that :meth:`start_epoch` has started.

        Args:
            state: what :meth:`state_dict` has given.
            sums: the epoch's so far.
            window: what :meth:`open_window` has given, of all ranks together.
            is_first: whether this rank goes on with that window; the others begin with nothing.

        Raises:
            CheckpointMismatchError: the window's gradients are those of other parameters.
        """
        for name in ("num_windows", "num_batches", "num_skipped"):
            setattr(self, name, state[name])
        self._num_in_window, self._first_window = state["num_in_window"], state["first_window"]
        self.window_open = self._num_in_window > 0
        rate = state["learning_rate"]
        self.learning_rate = None if rate is None else mx.array(rate)
        if sums is not None:
            self.sums.load_state_dict(sums)
        if window:
            self._loaded_weight = float(np.array(window[_WEIGHT]))
        if window and is_first:
            self._window = [snapshot(self.model.trainable_parameters()), *[mx.array(0.0)] * 2]
            load_window(self._window, window)
        self._settled = self.sums.num_added
        if self._num_in_window >= self.options.gradient_accumulation:  # it was more when saved
            self.close_window()
            self.settle()

    # --- a batch that may be computed in parts, or again ------------------------------------------

    def begin_window(self) -> None:
        """Where there are other ranks: begin a window, unless one is open."""
        if self.exchange is not None and not self._has_begun:
            self._has_begun = True
            self.exchange.begin(self.model, self.num_windows, self._loaded_weight)
            self._loaded_weight = 0.0

    @property
    def state_parts(self) -> list[Any]:
        """What a batch changes, random key apart. Another list after the step was built anew."""
        return self._state

    @property
    def window(self) -> list[Any]:
        """Weighted gradients, their weight and how many were bad; empty between windows."""
        return self._window

    def wait_for_gradients(self) -> None:
        """Evaluate all of the newest part but the update. Host synchronisation."""
        gradients = self._gradients_of_batch or [self._state, self._window]
        self._gradients_of_batch = []  # the update may reuse them
        live = gradients, self.sums.batch, self.sums.rows.newest
        try:
            mx.eval(*live)
        except RuntimeError as error:
            evaluate_again(error, *live)

    def end_batch(self, weight: float | None) -> None:
        """Count a batch, and close its window if it was the last of it."""
        self.num_batches += 1
        if self._is_fused:
            self.num_windows += 1
            self.num_skipped += weight == 0.0  # the host knew it, and nothing was dispatched
            return
        self._num_in_window += 1
        self.window_open = self._num_in_window < self.options.gradient_accumulation
        if not self.window_open or self.num_batches == self._last_batch:
            self.close_window()

    def forget_parts(self, window: list[Any], mark: tuple[int, int, int]) -> None:
        """Take back parts that will be redone: to a window, and a mark of the sums."""
        self._window, self._gradients_of_batch = window, []
        self.sums.back_to(mark)
        self.is_whole = True

    def recover(self) -> None:
        """After a failed allocation: see whether the step can be finished once memory is free.

        Nothing is lost then: what was computed is there, and the rest is computed now.
        """
        mx.clear_cache()
        with contextlib.suppress(RuntimeError, MemoryError):
            mx.eval(
                self._state,
                self._window,
                self.sums.pending[-2:],
                self.sums.open,
                self.sums.rows.newest,
            )
            self.is_whole = True
