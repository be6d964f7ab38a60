"""What `fit`, `evaluate` and `predict` accept, as batches.

Imports layer 2: data.arrays, data.dataset, data.loader, data.mlx_data, data.shares.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from mlx_fit.batch import num_rows
from mlx_fit.data.arrays import flatten, is_array, is_scalar
from mlx_fit.data.dataset import ArrayDataset, Subset, exact_fraction, is_dataset, rows_of
from mlx_fit.data.loader import DataLoader
from mlx_fit.data.mlx_data import is_mlx_stream
from mlx_fit.data.shares import Rates
from mlx_fit.errors import ConfigurationError, DataError, ResumeError

__all__ = [
    "BatchSource",
    "FunctionSource",
    "IteratorSource",
    "RowSource",
    "Source",
    "as_source",
    "split_rows",
]

_ACCEPTED = (
    "Accepted are: a tuple (x, y) or (x, y, weights) of arrays, or x alone; a list of batches; a "
    "dataset with __len__ and __getitem__; a DataLoader or any other iterable of batches; or a "
    "function without arguments that returns one."
)


class Source(ABC):
    """Data that gives batches, pass after pass.

    Attributes:
        name: what the user calls it, for messages.
        num_batches: batches of one pass; None if unknown.
        num_rows: rows of one pass; None if unknown.
        batch_size: rows of a batch, the last one apart; None if unknown.
        one_shot: it is an iterator: a second pass goes on where the first one stopped.
    """

    name: str
    num_batches: int | None
    num_rows: int | None
    batch_size: int | None
    one_shot: bool

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[Any]:
        """One pass over the data. ``epoch`` decides the order of rows that are shuffled here.

        After :meth:`restore` the next pass is what was left of the saved one.
        """

    @abstractmethod
    def position(self, num_batches: int, untaken: Any) -> dict[str, Any] | None:
        """Where the current pass is, as plain values; None if that cannot be told.

        Args:
            num_batches: batches of the pass that were taken.
            untaken: a batch that was drawn after them and not taken, or None.
        """

    @abstractmethod
    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        """Let the next pass begin after ``num_batches`` of the pass with a saved position.

        Raises:
            ResumeError: the data is not what it was.
        """


class RowSource(Source):
    """Arrays, or a dataset of rows, batched here.

    Attributes:
        iterable: the loader that batches them.
    """

    def __init__(
        self, dataset: Any, *, batch_size: int, shuffle: bool, seed: int | None, name: str
    ) -> None:
        self.name = name
        self.iterable = self._loader = DataLoader(
            dataset, batch_size=batch_size, shuffle=shuffle, seed=seed
        )
        self.num_rows = len(self._loader.dataset)
        self.batch_size = batch_size
        self.num_batches = len(self._loader)
        self.one_shot = False
        self._start = (0, 0)  # batches and samples before the first batch of this pass
        self._next_start = (0, 0)

    def batches(self, epoch: int) -> Iterator[Any]:
        return self.batches_of(epoch, 1, 0)

    def batches_of(self, epoch: int, size: int, rank: int, rates: Rates = None) -> Iterator[Any]:
        """The share of one of ``size`` ranks of every batch of a pass."""
        self._start, self._next_start = self._next_start, (0, 0)
        state = self._loader.state_dict() | {"epoch": epoch, "samples_consumed": self._start[1]}
        self._loader.load_state_dict(state)
        return iter(self._loader if size == 1 else self._loader.shard(size, rank, rates))

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any]:
        first, samples = self._start
        state = self._loader.state_dict()
        samples = min(samples + (num_batches - first) * state["batch_size"], state["n"])
        kept = {key: state[key] for key in ("version", "n", "shuffle")}
        return {**kept, "samples_consumed": samples}

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        state = self._loader.state_dict()
        for field in ("version", "n") + (("shuffle",) if num_batches else ()):
            if position.get(field) != state[field]:
                raise ResumeError(
                    f"The checkpoint was made with {field}={position.get(field)!r} of {self.name}, "
                    f"but now it has {field}={state[field]!r}: the rows that were left would be "
                    "others. Use the same data."
                )
        self._next_start = (num_batches, position["samples_consumed"] if num_batches else 0)


class BatchSource(Source):
    """An iterable of batches: a list, a DataLoader (ours counts its epochs itself), and so on.

    Attributes:
        iterable: as given.
    """

    def __init__(self, iterable: Iterable[Any], *, name: str) -> None:
        self.name = name
        self.iterable = iterable
        self.num_batches = _length(iterable)
        self.num_rows = None
        size = getattr(iterable, "batch_size", None)  # a DataLoader's, ours or torch's
        self.batch_size = size if isinstance(size, int) else None
        self.one_shot = False
        self._num_skipped = 0
        self._is_stateful = all(
            callable(getattr(iterable, method, None))
            for method in ("state_dict", "load_state_dict")
        )

    def batches(self, epoch: int) -> Iterator[Any]:
        skipped, self._num_skipped = self._num_skipped, 0
        if isinstance(self.iterable, list):
            return islice(self.iterable, skipped, None)
        return skipping(iter(self.iterable), skipped, self.name)

    def batches_of(self, epoch: int, size: int, rank: int, rates: Rates = None) -> Iterator[Any]:
        """The share of one of ``size`` ranks of every batch of a pass of a DataLoader."""
        assert isinstance(self.iterable, DataLoader)
        return iter(self.iterable.shard(size, rank, rates))

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any] | None:
        if not self._is_stateful:
            return {}
        state = self.iterable.state_dict()  # type: ignore[attr-defined]
        if untaken is not None:
            if not isinstance(self.iterable, DataLoader):
                return None  # it has counted a batch that nobody took
            rest = state["samples_consumed"] - num_rows(untaken)
            state = state | {"samples_consumed": rest}
            if "dataset_state" in state:  # it is after the batch: rows are read up to it instead
                state["dataset_state"] = None
        return {"loader": state}

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        if not self._is_stateful or "loader" not in position:
            self._num_skipped = num_batches
            return
        state = position["loader"]
        if isinstance(self.iterable, DataLoader):
            # Counted in samples, so another batch size can go on from there.
            state = state | {"batch_size": self.iterable.batch_size}
        self.iterable.load_state_dict(state)  # type: ignore[attr-defined]


class IteratorSource(Source):
    """An iterator of batches, which nobody can start again."""

    def __init__(self, iterator: Iterator[Any], *, name: str) -> None:
        self.name = name
        self._iterator = iterator
        self.num_batches = None
        self.num_rows = None
        self.batch_size = None
        self.one_shot = True

    def batches(self, epoch: int) -> Iterator[Any]:
        return self._iterator

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any]:
        return {}

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        self._iterator = skipping(self._iterator, num_batches, self.name)


class FunctionSource(Source):
    """A function that returns the batches of a pass, called for each."""

    def __init__(self, function: Callable[[], Iterable[Any]], *, name: str) -> None:
        self.name = name
        self._function = function
        self.num_batches = None
        self.num_rows = None
        self.batch_size = None
        self.one_shot = False
        self._num_skipped = 0

    def batches(self, epoch: int) -> Iterator[Any]:
        result = self._function()
        # Iterating over a tuple or a dict of arrays would take each array for a batch.
        if isinstance(result, tuple | dict | str) or not hasattr(result, "__iter__"):
            raise DataError(
                f"{self.name}: the function returned a {type(result).__name__}; it must return an "
                "iterator or another iterable of batches."
            )
        skipped, self._num_skipped = self._num_skipped, 0
        return skipping(iter(result), skipped, self.name)

    def position(self, num_batches: int, untaken: Any) -> dict[str, Any]:
        return {}

    def restore(self, position: dict[str, Any], num_batches: int) -> None:
        self._num_skipped = num_batches


def skipping(batches: Iterator[Any], count: int, name: str, may_end: bool = False) -> Iterator[Any]:
    """The batches after the first ``count``, which are read and discarded.

    Raises:
        ResumeError: there are fewer, and they ``may_end`` no sooner.
    """
    if count:
        warnings.warn(
            f"To resume, the first {count} batches of {name} are read and discarded: they must "
            "come in the same order as before. A mlx_fit.DataLoader goes to its place at once.",
            stacklevel=2,
        )
        found = sum(1 for _ in islice(batches, count))
        if found < count and not may_end:
            raise ResumeError(
                f"The checkpoint was made after {count} batches of a pass over {name}, which has "
                f"{found} now. Use the same data."
            )
    return batches


def as_source(
    data: Any,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    name: str = "train",
    may_be_empty: bool = False,
) -> Source:
    """The :class:`Source` for what a user passed as data.

    - A tuple is ``(x,)``, ``(x, y)`` or ``(x, y, weights)``, each an array (NumPy, MLX, anything
      with ``__array__``) or a dict, list or tuple of arrays; an array or a dict of arrays alone
      is ``x``. These are batched here.
    - A list is a list of batches. A Keras ``PyDataset`` gives batches, too.
    - Anything else with ``__len__`` and ``__getitem__`` is a dataset of rows, batched here.
    - A :class:`DataLoader`, PyTorch's, or any other iterable gives batches, each pass anew; an
      iterator gives them once.
    - A stream of mlx-data gives batches, reset for each pass.
    - A function without arguments is called for each pass and returns one of the last.

    Batches that come from outside pass as they are, in their order: ``batch_size``, ``shuffle`` and
    ``seed`` are for data batched here.

    Args:
        data: see above.
        batch_size: rows per batch.
        shuffle: visit rows in the order that ``seed`` and the epoch give, instead of their own.
        seed: None draws one.
        name: what to call the data in messages.
        may_be_empty: whether data without a batch is accepted: the part of one of several ranks.

    Raises:
        DataError: there is no data, or it is none of the above.
    """
    source: Source
    while type(data) is tuple and len(data) > 1 and data[-1] is None:
        data = data[:-1]
    if _is_keras_dataset(data):
        return FunctionSource(lambda: (data[i] for i in range(len(data))), name=name)
    if is_mlx_stream(data):
        data = rows_of(data)
    rows = _rows(data, name)
    if rows is not None:
        source = RowSource(rows, batch_size=batch_size, shuffle=shuffle, seed=seed, name=name)
    elif hasattr(data, "__next__"):
        source = IteratorSource(data, name=name)
    elif hasattr(data, "__iter__"):
        source = BatchSource(data, name=name)
    elif callable(data):
        source = FunctionSource(data, name=name)
    else:
        raise _refused(data, name)
    if source.num_batches == 0 and not may_be_empty:
        raise DataError(f"{name} is empty: {_describe(data)} without a single row or batch.")
    return source


def _is_keras_dataset(data: Any) -> bool:
    """Whether ``data[i]`` is a batch, as Keras's ``PyDataset`` has it, and not a row."""
    return any(
        kind.__name__ in ("PyDataset", "Sequence") and kind.__module__.startswith(("keras", "tf"))
        for kind in type(data).__mro__
    )


def split_rows(
    data: Any, fraction: float, name: str = "validation_split"
) -> tuple[ArrayDataset | Subset, ArrayDataset | Subset]:
    """The first rows for training and the last ``fraction`` of them for validation.

    Args:
        data: arrays or a dataset, as for :func:`as_source`.
        fraction: between 0 and 1. Training gets ``floor(rows * (1 - fraction))`` rows, computed
            with the fraction that was written: of 10 rows and 0.3 it gets 7.
        name: the argument to name in messages.

    Returns:
        Datasets for training and for validation, over the same memory.

    Raises:
        ConfigurationError: ``fraction`` is not between 0 and 1.
        DataError: ``data`` is no arrays or dataset, or a part would be empty.
    """
    if not (isinstance(fraction, int | float) and 0 < fraction < 1):
        raise ConfigurationError(f"{name}={fraction!r}; expected a number between 0 and 1.")
    rows = _rows(data, name)
    if rows is None:
        raise DataError(
            f"{name} takes rows away from arrays or a dataset, but the data is {_describe(data)}, "
            "which gives batches. Pass the validation data as val instead."
        )
    num_rows = len(rows)
    num_train = math.floor(num_rows * (1 - exact_fraction(fraction)))
    if not 0 < num_train < num_rows:
        raise DataError(
            f"{name}={fraction!r} of {num_rows} rows leaves {num_train} for training and "
            f"{num_rows - num_train} for validation; both need one."
        )
    if isinstance(rows, ArrayDataset):
        return rows.part(0, num_train), rows.part(num_train, num_rows)
    return Subset(rows, range(num_train)), Subset(rows, range(num_train, num_rows))


def _rows(data: Any, name: str) -> Any | None:
    """``data`` as a dataset of rows, or None where it gives batches."""
    if data is None or is_scalar(data) or isinstance(data, type):
        raise _refused(data, name)
    if isinstance(data, list):
        return None
    if type(data) is tuple:
        if not 1 <= len(data) <= 3:
            raise DataError(
                f"{name} is a tuple of {len(data)}; expected arrays (x, y) or (x, y, weights). For "
                "batches use a list.",
                field=name,
            )
        data = data[0] if len(data) == 1 else data
    if isinstance(data, tuple | dict) or is_array(data):
        _check_no_objects(data, name)
        try:
            return rows_of(data)
        except DataError as error:
            raise DataError(f"{name}: {error}", field=error.field) from error
    return data if is_dataset(data) else None


def _check_no_objects(data: Any, name: str) -> None:
    for path, leaf in flatten(data):
        if isinstance(leaf, np.ndarray) and leaf.dtype == object:
            where = path or "x"
            raise DataError(
                f"{name}: {where} is an array of Python objects (dtype object, shape "
                f"{leaf.shape}); expected numbers. Convert it, for example with "
                f"{where}.astype(numpy.float32), and pad rows of different lengths to one.",
                field=where,
            )


def _refused(data: Any, name: str) -> DataError:
    return DataError(f"{name} is {_describe(data)}. {_ACCEPTED}", field=name)


def _length(iterable: Any) -> int | None:
    try:
        return len(iterable)
    except TypeError:
        # No __len__; or a loader over an iterable data set, which has the method but no length.
        return None


def _describe(value: Any) -> str:
    plain = value is None or is_scalar(value) or isinstance(value, type)
    return repr(value) if plain else f"a {type(value).__name__}"
