"""The collectives of one update: a small header of numbers, then the gradients in buckets.

The header goes first. It says how much the window weighs on all ranks together, so nothing else is
sent for a window that does not count, and what ranks ask for: to stop, to save.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit._tree import RandomState, assign, named_arrays
from mlx_fit.communicator import Shared, Votes, gather
from mlx_fit.distributed.desync import check_equal
from mlx_fit.distributed.ring import WAITING, Ring
from mlx_fit.distributed.strategy import Strategy
from mlx_fit.errors import ConfigurationError, DistributedError
from mlx_fit.logs import Sums
from mlx_fit.options import StepOptions

_TAGS = 4096  # windows are numbered modulo this, which float32 sums hold exactly


class NoVotes:
    """A step outside a fit: nobody asks for anything."""

    def wishes(self) -> list[float]:
        """Nothing."""
        return []

    def hear(self, totals: list[float]) -> None:
        """Nothing."""


class Windows:
    """Makes one window of those of all ranks.

    Args:
        ring: the ranks.
        strategy: how gradients become an update.
        check_every: updates between comparisons of all ranks' weights; 0: never.
        options: the step's.
        scales_loss: there is a loss scale, which an overflow has to lower.

    Attributes:
        votes: what this rank asks for.
        rank: this process's.
    """

    def __init__(
        self,
        ring: Ring,
        strategy: Strategy,
        check_every: int,
        options: StepOptions,
        scales_loss: bool,
    ) -> None:
        self.votes: Votes = NoVotes()
        self.rank = ring.rank
        self._ring = ring
        self._strategy = strategy
        self._scales_loss = scales_loss
        # Of one batch a bad share makes the whole bad; of several only that share is left out.
        self._drops_whole = options.nonfinite == "skip" and options.gradient_accumulation == 1
        self._check_every = check_every if strategy.keeps_equal else 0
        self._num_updates = 0
        self._capacity = 0  # lanes of the logs that all ranks know to send
        self._statistics: dict[str, mx.array] = {}
        self._key = RandomState([0, 0])
        self._loaded = 0.0  # weight of what all ranks had in the window when it was saved

    def begin(self, model: nn.Module, number: int, loaded: float) -> None:
        """A window begins: keep the running statistics, and draw this rank's own random numbers."""
        self._ring.at_step(number + 1)
        self._loaded = loaded if self._strategy.keeps_equal else 0.0
        self._statistics = dict(running_statistics(model))
        self._key = RandomState()
        if self._ring.rank:
            RandomState(folded(self._key.words, self._ring.rank, number)).restore()

    def gather_number(self, number: int) -> list[int]:
        """A number of every rank. Here ranks wait for the slowest, if they meet so at all."""
        found = self._ring.gather_arrays(mx.array([number], mx.int32), WAITING)
        numbers: list[int] = found.tolist()  # type: ignore[assignment]
        return numbers

    def close(self, model: nn.Module, window: list[Any], sums: Sums, number: int) -> Shared:
        """Put the parts of all ranks together."""
        mx.eval(window, sums.open, model.state)  # before anybody waits for the result
        weight, num_bad = (w.item() for w in window[1:]) if window else (0.0, 0.0)
        head = [weight, num_bad, number % _TAGS, float(sums.capacity_in_use > self._capacity)]
        key = RandomState().words if self._ring.rank == 0 else [0, 0]
        head += [part for word in key for part in (word >> 16, word & 0xFFFF)]
        wishes = self.votes.wishes()
        head += wishes
        (found,) = self._ring.sum([mx.concatenate([mx.array(head), self._logs(sums)])], WAITING)
        values: list[float] = found[: len(head)].tolist()  # type: ignore[assignment]
        if values[2] != head[2] * self._ring.size:
            raise DistributedError(
                f"The ranks are not at the same update: this one makes number {number + 1}. They "
                "must get equal data and arguments, and call fit, evaluate and save together."
            )
        words = [(int(values[i]) << 16) | int(values[i + 1]) for i in (4, 6)]
        if self._ring.rank:
            RandomState(words).restore()
        self.votes.hear(values[8 : 8 + len(wishes)])
        vector = found[len(head) :]
        if values[3]:
            vector = self._grow(sums)
        return self._shared(model, window, sums, vector, values[0], values[1])

    def _shared(
        self,
        model: nn.Module,
        window: list[Any],
        sums: Sums,
        vector: mx.array,
        weight: float,
        num_bad: float,
    ) -> Shared:
        is_bad = bool(num_bad) and self._drops_whole and not self._scales_loss
        if is_bad:
            weight, vector = 0.0, self._skipped(sums, vector)
        if not weight and not (num_bad and self._scales_loss):
            assign(model, self._statistics.items())
            return Shared([], vector, is_bad, is_update=False)
        gradients = dict(named_arrays(window[0])) if window else self._zeros(model)
        own = float(np.array(window[1])) if window else 0.0
        seen = self._seen(window)
        statistics = {n: v.astype(mx.float32) * seen for n, v in running_statistics(model)}
        gradients, statistics, divisor = self._strategy.reduce(
            self._ring, gradients, statistics, own, weight
        )
        if not divisor and not num_bad:
            return Shared([], vector, False, is_update=True)  # this rank had nothing to learn from
        assign(model, self._averaged(statistics, divisor - self._loaded).items())
        tree = unnamed(model.trainable_parameters(), gradients)
        summed = [tree, mx.array(divisor), mx.array(num_bad)]
        return Shared(summed, vector, False, is_update=True)

    def _seen(self, window: list[Any]) -> float:
        """The weight of this rank's rows, from which its running statistics are.

        What a checkpoint held of the window is in the statistics of all ranks already.
        """
        loaded = 0.0 if self.rank else self._loaded
        return float(np.array(window[1])) - loaded if window else 0.0

    def _averaged(self, sums: dict[str, mx.array], weight: float) -> dict[str, mx.array]:
        """Running statistics from their sums, in their own dtype; {} if nothing was seen."""
        if weight <= 0:
            return {}
        dtypes = {name: value.dtype for name, value in self._statistics.items()}
        return {n: (s / weight).astype(dtypes[n]) for n, s in sums.items()}

    def statistics(self, model: nn.Module, window: list[Any]) -> dict[str, mx.array]:
        """Those of a window that is not closed, for a checkpoint: one sum, and nothing changes."""
        named = running_statistics(model)
        if not named or not self._strategy.keeps_equal:
            return {}
        seen = self._seen(window)
        parts = [value.astype(mx.float32).reshape(-1) * seen for _, value in named]
        (total,) = self._ring.sum([mx.concatenate([mx.array([seen]), *parts])], "statistics")
        ends = [*accumulate([1, *(value.size for _, value in named)])]
        weight, *sums = mx.split(total, ends[:-1])
        shaped = {n: s.reshape(v.shape) for (n, v), s in zip(named, sums, strict=True)}
        return self._averaged(shaped, float(np.array(weight)[0]))

    @staticmethod
    def _zeros(model: nn.Module) -> dict[str, mx.array]:
        """The gradients of a rank without samples."""
        parameters = named_arrays(model.trainable_parameters())
        return {name: mx.zeros(value.shape, mx.float32) for name, value in parameters}

    def update(self, model: nn.Module, apply: Callable[[], mx.array] | None) -> mx.array | None:
        """Apply a window, if this rank has one; and what follows from it for all ranks."""
        strategy, ring = self._strategy, self._ring
        vector = None if apply is None else strategy.update(ring, model, apply)
        strategy.after_update(ring, model)
        self._num_updates += 1
        if self._check_every and self._num_updates % self._check_every == 0:
            check_equal(ring, model, ring.step)
        return vector

    def finish(self, model: nn.Module) -> None:
        """The fit ends: the ranks get equal weights."""
        self._strategy.finish(self._ring, model)

    # --- logs -------------------------------------------------------------------------------------

    def _logs(self, sums: Sums) -> mx.array:
        """This rank's part of the window's packed sums, in the lanes that all ranks send."""
        vectors = [vector for vector in sums.open if vector.size <= self._capacity]
        if not vectors or len(vectors) < len(sums.open):
            return mx.zeros((self._capacity,))
        total = mx.zeros((self._capacity,))
        for vector in vectors:
            total = total + mx.pad(vector, (0, self._capacity - vector.size))
        return total

    @staticmethod
    def _skipped(sums: Sums, vector: mx.array) -> mx.array:
        """The logs of a window that is left out: that it was, and nothing else."""
        lanes = sums.layout.lanes("skipped_updates")
        return sum((mx.arange(vector.size) == lane for lane in lanes), mx.zeros_like(vector))

    def _grow(self, sums: Sums) -> mx.array:
        """Agree on more lanes, and on what is in them; then sum once more."""
        own = {"lanes": sums.capacity_in_use, "slices": sums.layout.plain()}
        known = gather(self._ring, own, "logs")
        self._capacity = max(found["lanes"] for found in known)
        sums.widen(self._capacity)
        slices = [found["slices"] for found in known if found["slices"]]
        if any(other != slices[0] for other in slices):
            raise ConfigurationError(
                "Ranks log different metrics, or matrices of other sizes. All of them need the "
                "same loss, metrics and callbacks."
            )
        if slices and not sums.layout.slices:
            sums.layout.expect_plain(slices[0])
        return self._ring.sum([self._logs(sums)], "logs")[0]


def running_statistics(model: nn.Module) -> list[tuple[str, mx.array]]:
    """The running means and variances of a model's normalisation layers, by name."""
    trained = {name for name, _ in named_arrays(model.trainable_parameters())}
    return [
        (name, value)
        for name, value in named_arrays(model.parameters())
        if name.rpartition(".")[2].startswith("running_") and name not in trained
    ]


def folded(words: list[int], rank: int, number: int) -> list[int]:
    """The random key of a rank in a window: a function of the shared key, both numbers included."""
    text = f"{words[0]}:{words[1]}:{rank}:{number}".encode()
    digest = blake2b(text, digest_size=8).digest()
    return [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]


def unnamed(like: Any, named: dict[str, mx.array]) -> Any:
    """A tree of the structure of ``like``, with the arrays of these names."""
    found = iter(named.values())
    return rebuilt(like, found)


def rebuilt(like: Any, found: Any) -> Any:
    """A tree of the structure of ``like`` from its leaves in order."""
    if isinstance(like, dict):
        return {key: rebuilt(child, found) for key, child in like.items()}
    if isinstance(like, (list, tuple)):
        return type(like)(rebuilt(child, found) for child in like)
    return next(found)
