"""Checks of the arguments that loaders take."""

from __future__ import annotations

from typing import Any

from mlx_fit.errors import ConfigurationError

__all__ = ["check_exclusions", "check_stream"]


def check_exclusions(
    *, batch_size: Any, shuffle: Any, sampler: Any, batch_sampler: Any, drop_last: Any
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


def check_stream(dataset: Any, *, shuffle: bool, sampler: Any, batch_sampler: Any) -> None:
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
