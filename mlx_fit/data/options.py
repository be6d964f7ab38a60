"""Checks of the arguments that loaders take."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fit.checks import boolean, natural
from mlx_fit.errors import ConfigurationError

__all__ = [
    "WorkerOptions",
    "check_exclusions",
    "check_kinds",
    "check_stream",
    "seed_of",
    "worker_options",
]


def check_exclusions(
    batch_size: Any, shuffle: Any, sampler: Any, batch_sampler: Any, drop_last: Any
) -> None:
    """PyTorch's rules: a sampler replaces ``shuffle``, a batch_sampler everything about batches.

    Raises:
        ConfigurationError: two arguments decide the same thing.
    """
    if batch_sampler is not None:
        others = {"shuffle": shuffle, "sampler": sampler is not None, "drop_last": drop_last}
        given = ["batch_size"] * (batch_size != 1) + [name for name, on in others.items() if on]
        if given:
            raise ConfigurationError(
                f"batch_sampler decides the batches, so {' and '.join(given)} cannot be given too; "
                "leave one of them out."
            )
    if sampler is not None and shuffle:
        raise ConfigurationError(
            "sampler decides the order, so shuffle=True cannot be given too; leave one of them out."
        )


def check_kinds(sampler: Any, batch_sampler: Any, collate_fn: Any) -> None:
    """That samplers can be iterated over and ``collate_fn`` can be called.

    Raises:
        ConfigurationError: one cannot.
    """
    for name, value in (("sampler", sampler), ("batch_sampler", batch_sampler)):
        if value is not None and not isinstance(value, Iterable):
            items = "lists of row indices" if name == "batch_sampler" else "row indices"
            raise ConfigurationError(
                f"{name} is a {type(value).__name__}; expected an iterable of {items}."
            )
    if collate_fn is not None and not callable(collate_fn):
        raise ConfigurationError(
            f"collate_fn is a {type(collate_fn).__name__}; expected a function of a list of rows."
        )


def check_stream(dataset: Any, shuffle: bool, sampler: Any, batch_sampler: Any) -> None:
    """What reading a dataset that is no more than an iterable of rows rules out.

    Raises:
        ConfigurationError: ``dataset`` is no iterable, or an argument needs rows by index.
    """
    name = type(dataset).__name__
    if not hasattr(dataset, "__iter__"):
        raise ConfigurationError(
            f"dataset is a {name}; expected arrays, a dataset with __len__ and __getitem__, or an "
            "iterable of rows."
        )
    if shuffle or sampler is not None or batch_sampler is not None:
        raise ConfigurationError(
            f"dataset is an iterable ({name}) with an order of its own; shuffle, sampler and "
            "batch_sampler need a dataset with __len__ and __getitem__."
        )


@dataclass(frozen=True)
class WorkerOptions:
    """Where batches are made: PyTorch's arguments of these names.

    Attributes:
        num_workers: processes; 0 makes batches in the caller's process.
        timeout: seconds to wait for a batch; 0 waits for ever.
        worker_init_fn: called with its number in each process.
        prefetch_factor: batches read ahead, by each process; 0 reads nothing ahead.
        persistent_workers: keep the processes after a pass.
    """

    num_workers: int
    timeout: float
    worker_init_fn: Callable[[int], Any] | None
    prefetch_factor: int
    persistent_workers: bool


def worker_options(
    num_workers: Any,
    timeout: Any,
    worker_init_fn: Any,
    prefetch_factor: Any,
    persistent_workers: Any,
) -> WorkerOptions:
    """The checked arguments.

    Raises:
        ConfigurationError: one has a value that cannot work, or would have no effect.
    """
    num_workers = natural("num_workers", num_workers)
    prefetch_factor = natural("prefetch_factor", 2 if prefetch_factor is None else prefetch_factor)
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 <= timeout < math.inf:
        raise ConfigurationError(f"timeout={timeout!r}; expected seconds, 0 to wait for ever.")
    if worker_init_fn is not None and not callable(worker_init_fn):
        raise ConfigurationError(
            f"worker_init_fn is a {type(worker_init_fn).__name__}; expected a function of the "
            "worker's number."
        )
    if boolean("persistent_workers", persistent_workers) and not num_workers:
        raise ConfigurationError("persistent_workers=True needs num_workers of at least 1.")
    if worker_init_fn is not None and not num_workers:
        raise ConfigurationError("worker_init_fn needs num_workers of at least 1.")
    if not prefetch_factor and (num_workers or timeout):
        raise ConfigurationError(
            "prefetch_factor=0 reads in the caller's thread; num_workers and timeout need at least "
            "1 batch read ahead."
        )
    return WorkerOptions(num_workers, timeout, worker_init_fn, prefetch_factor, persistent_workers)


def seed_of(seed: int | None, generator: Any) -> int:
    """The seed of a loader: as given, the generator's, or drawn.

    Raises:
        ConfigurationError: both are given, or the generator is of no known kind.
    """
    if generator is None:
        return int.from_bytes(os.urandom(4), "big") if seed is None else natural("seed", seed)
    if seed is not None:
        raise ConfigurationError("seed and generator both decide the order; leave one of them out.")
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**32))
    if callable(getattr(generator, "initial_seed", None)):  # torch's
        return int(generator.initial_seed()) % 2**64
    raise ConfigurationError(
        f"generator is a {type(generator).__name__}; expected a numpy.random.Generator, of which "
        "one seed is drawn, or a torch.Generator, whose initial seed is taken."
    )
