"""Buffers and streams of mlx-data as datasets. mlx-data itself is never imported."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_fit.errors import ConfigurationError, DataError

__all__ = ["from_mlx_data", "is_mlx_stream"]


def from_mlx_data(
    source: Any, x: str | Sequence[str] | None = None, y: str | None = None
) -> _Buffer | _Stream:
    """A buffer or stream of mlx-data, for :class:`DataLoader` and ``fit``.

    A buffer becomes a dataset of rows, shuffled and resumed by our order. A stream becomes an
    iterable that starts again (``reset``) with each pass; a resumed run reads it up to its place,
    which is the same place if the stream repeats itself. One that shuffles does not, nor one with
    ``prefetch(n, num_threads)`` of several threads: their rows change places now and then, and a
    ``batch`` before it may be cut into smaller ones at the end; one thread is exact. Give a stream
    of samples to a ``DataLoader``, which batches it, and a stream of batches to ``fit`` as it is.
    A buffer of batches goes through ``to_stream()``.

    Args:
        source: an ``mlx.data.Buffer`` or ``mlx.data.Stream``; its samples are dicts of arrays.
        x: the key of the inputs, or several, which become a dict. Default: samples stay dicts.
        y: the key of the targets; then samples become ``(x, y)``.

    Raises:
        ConfigurationError: ``source`` is neither, or ``y`` is given without ``x``.
        DataError: a sample lacks a key.

    Example:
        >>> import numpy as np
        >>> import mlx.data  # doctest: +SKIP
        >>> from mlx_fit.data import DataLoader, from_mlx_data
        >>> samples = [{"image": np.zeros(4), "label": i} for i in range(6)]
        >>> buffer = mlx.data.buffer_from_vector(samples)  # doctest: +SKIP
        >>> rows = from_mlx_data(buffer, "image", "label")  # doctest: +SKIP
        >>> [y.tolist() for _, y in DataLoader(rows, batch_size=4)]  # doctest: +SKIP
        [[0, 1, 2, 3], [4, 5]]
    """
    if y is not None and x is None:
        raise ConfigurationError(f"y={y!r} needs x, the key of the inputs.")
    if y is not None and not isinstance(y, str):
        raise ConfigurationError(f"y={y!r}; expected a key.")
    keys = _Keys(x if x is None or isinstance(x, str) else _checked(x), y)
    if is_mlx_stream(source):
        return _Stream(source, keys)
    if hasattr(source, "to_stream") and hasattr(source, "__getitem__"):
        return _Buffer(source, keys)
    raise ConfigurationError(
        f"source is a {type(source).__name__}; expected an mlx.data.Buffer or mlx.data.Stream."
    )


def is_mlx_stream(data: object) -> bool:
    """Whether ``data`` is a stream of mlx-data, which is an iterator that can be reset."""
    return all(hasattr(data, name) for name in ("__next__", "reset", "to_buffer"))


def _checked(x: Any) -> list[str]:
    keys = list(x) if isinstance(x, list | tuple) else []
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ConfigurationError(f"x={x!r}; expected a key or a list of keys.")
    return keys


class _Keys:
    """Picks inputs and targets out of a sample."""

    def __init__(self, x: str | list[str] | None, y: str | None) -> None:
        self._x = x
        self._y = y

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            if self._x is None:
                return sample
            x: Any = (
                sample[self._x]
                if isinstance(self._x, str)
                else {key: sample[key] for key in self._x}
            )
            return x if self._y is None else (x, sample[self._y])
        except KeyError as error:
            raise DataError(
                f"A sample of mlx-data has no {error}; it has {', '.join(sorted(sample))}. Change "
                "x or y.",
                field=str(error.args[0]),
            ) from error


class _Buffer:
    def __init__(self, buffer: Any, keys: _Keys) -> None:
        self._buffer = buffer
        self._keys = keys

    def __len__(self) -> int:
        return len(self._buffer)

    def __getitem__(self, index: int) -> Any:
        return self._keys(self._buffer[range(len(self))[operator.index(index)]])


class _Stream:
    def __init__(self, stream: Any, keys: _Keys) -> None:
        self._stream = stream
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        self._stream.reset()
        return map(self._keys, iter(self._stream))
