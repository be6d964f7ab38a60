"""What ``fit`` costs over a compiled loop by hand, measured where one runs beside the other."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit import errors
from mlx_fit.callbacks.base import Callback
from mlx_fit.trainer import Trainer

ROOT = str(Path(errors.__file__).parent)
LEAST_ROUNDS = 3  # of a comparison whose time is up
STEADY = range(50, 150)  # the batches whose calls are counted


class MLP(nn.Module):
    """``(batch, 256)`` to ``(batch, 10)`` over one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(256, width)
        self.head = nn.Linear(width, 10)

    def __call__(self, x: mx.array) -> mx.array:
        """Logits."""
        return self.head(nn.relu(self.hidden(x)))


def make_model(width: int) -> tuple[MLP, optim.AdamW]:
    """The network and its optimizer, the same each time; draws nothing of MLX's random key."""
    rng = np.random.default_rng(0)
    model, optimizer = MLP(width), optim.AdamW(1e-3)
    model.hidden.weight = mx.array(rng.uniform(-1, 1, (width, 256)).astype(np.float32) / 16)
    model.head.weight = mx.array(rng.uniform(-1, 1, (10, width)).astype(np.float32) / width**0.5)
    mx.eval(model.parameters())
    return model, optimizer


def make_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 256)).astype(np.float32), rng.integers(0, 10, count)


def by_hand(width: int, x: np.ndarray, y: np.ndarray, batch_size: int) -> Callable[[], float]:
    """A function that trains an epoch with a loop by hand and returns its seconds.

    The loop does what a user would: slice, convert, one compiled step, one ``mx.eval``.
    """
    model, optimizer = make_model(width)
    optimizer.init(model.trainable_parameters())

    def loss_function(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x), y).mean()

    state = [model.state, optimizer.state, mx.random.state]

    def update(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_function)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    step = partial(mx.compile, inputs=state, outputs=state)(update)
    rng = np.random.default_rng(0)

    def batches() -> Iterator[tuple[mx.array, mx.array]]:
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            yield mx.array(x[rows]), mx.array(y[rows])

    def epoch() -> float:
        start = time.perf_counter()
        for a, b in batches():
            loss = step(a, b)
            mx.eval(state, loss)
        return time.perf_counter() - start

    return epoch


class EpochClock(Callback):
    """Times epochs from inside, so that compilation of the first stays out.

    It stands first to begin, and a second one last to end.
    """

    def __init__(self, first: EpochClock | None = None) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.marks = (0.0, 0.0)
        self._first = first

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """The epoch begins, and what other callbacks do at that."""
        self.marks = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """All others have done what they do at its end."""
        wall, cpu = (self._first or self).marks
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)


class Alternate(Callback):
    """Runs loops by hand between epochs, so that all see the same machine."""

    def __init__(
        self, hand: Callable[[], float], again: Callable[[], float], seconds: float
    ) -> None:
        self._ends_at = time.perf_counter() + seconds
        self.around: list[float] = []  # after an epoch of fit, and before the next
        self.twice: list[float] = []
        self.cpu_seconds: list[float] = []
        self._hand, self._again = hand, again

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """One, another, and the first again."""
        self.around.append(self._hand())
        start = time.process_time()
        self.twice.append(self._again())
        self.cpu_seconds.append(time.process_time() - start)
        self.around.append(self._hand())
        if time.perf_counter() > self._ends_at and epoch >= LEAST_ROUNDS:
            self.trainer.request_stop("Alternate")


@dataclass(frozen=True)
class Comparison:
    """Epochs of ``fit`` and of the loop by hand.

    Attributes:
        step_ms: median time of a step by hand.
        ratios: each epoch of ``fit`` over the mean of the two by hand around it.
        noise: each epoch of a second loop by hand over the mean of the two around it.
        over_us: time of a step of ``fit`` beyond one by hand, median of the same pairs, in
            microseconds.
        over_cpu_us: the same in processor time of all threads, of an epoch and the one after it.
    """

    step_ms: float
    ratios: list[float]
    noise: list[float]
    over_us: float
    over_cpu_us: float


def against_hand(
    width: int,
    batch_size: int,
    steps: int,
    rounds: int,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
    seconds: float = math.inf,
) -> Comparison:
    """Compare epochs of ``fit``, with a metric and with callbacks, with the loop by hand.

    An epoch is compared with the mean of the two by hand that stand around it, so that a machine
    that grows slower counts on both sides. The time of ``fit`` holds what callbacks do at its end.
    The comparison ends after ``seconds``, if its rounds have not ended it before.
    """
    x, y = make_rows(steps * batch_size)
    hand, again = by_hand(width, x, y, batch_size), by_hand(width, x, y, batch_size)
    hand(), again()
    trainer = _trainer(width, batch_size)
    begin = EpochClock()
    end, hands = EpochClock(begin), Alternate(hand, again, seconds)
    with contextlib.redirect_stdout(io.StringIO()):
        order = [begin, *callbacks, end, hands]
        trainer.fit((x, y), epochs=rounds + 1, callbacks=order, verbose=verbose)
    around, pairs = hands.around, range(1, len(end.seconds))  # the first epoch compiles
    fits = [end.seconds[i] for i in pairs]
    outside = [(around[2 * i - 1] + around[2 * i]) / 2 for i in pairs]
    beside = [(around[2 * i] + around[2 * i + 1]) / 2 for i in pairs]
    over = [f - b for f, b in zip(fits, outside, strict=True)]
    over_cpu = [end.cpu_seconds[i] - hands.cpu_seconds[i] for i in pairs]
    return Comparison(
        1e3 * statistics.median(around[1:]) / steps,
        [f / b for f, b in zip(fits, outside, strict=True)],
        [hands.twice[i] / b for i, b in zip(pairs, beside, strict=True)],
        1e6 * statistics.median(over) / steps,
        1e6 * statistics.median(over_cpu) / steps,
    )


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by ranks, as for the sign test."""
    ordered = sorted(values)
    half = round(0.98 * len(ordered) ** 0.5)
    low = ordered[max(len(ordered) // 2 - half, 0)]
    high = ordered[min((len(ordered) - 1) // 2 + half, len(ordered) - 1)]
    return statistics.median(ordered), low, high


class CountCalls(Callback):
    """Counts calls of this package's functions between the ends of steady batches."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._count = 0

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """One batch is over, and the next begins."""
        sys.setprofile(None)
        if batch > STEADY.start:
            self.counts.append(self._count)
        self._count = 0
        if batch in STEADY:
            sys.setprofile(self._note)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """No more is counted."""
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT) and name != __file__:
            self._count += 1


def calls_of_batches(
    width: int, batch_size: int, callbacks: Sequence[Callback] = (), verbose: int = 1
) -> list[int]:
    """Calls of this package's functions in each of 100 steady batches of a fit."""
    counter = CountCalls()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = _trainer(width, batch_size)
        rows = make_rows((STEADY.stop + 1) * batch_size)
        trainer.fit(rows, callbacks=[*callbacks, counter], verbose=verbose)
    return counter.counts[: len(STEADY)]


def _trainer(width: int, batch_size: int) -> Trainer:
    model, optimizer = make_model(width)
    return Trainer(model, optimizer, "cross_entropy", ["accuracy"], batch_size=batch_size)
