"""Datasets of rows, composed from each other.

Imports layer 2: data.arrays, data.mapped, data.mlx_data, data.table.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlx_fit.data.arrays import batch_dtype, flatten, is_array, skeleton, to_numpy, unflatten
from mlx_fit.data.mapped import by_file
from mlx_fit.data.mlx_data import from_mlx_data, is_mlx_stream
from mlx_fit.data.order import order
from mlx_fit.data.table import is_arrow_table, open_table
from mlx_fit.errors import ConfigurationError, DataError

__all__ = [
    "ArrayDataset",
    "ConcatDataset",
    "Map",
    "SeededDataset",
    "Subset",
    "Transformed",
    "exact_fraction",
    "is_dataset",
    "random_split",
    "rows_of",
    "seeded",
]


@runtime_checkable
class SeededDataset(Protocol):
    """A dataset whose rows depend on the seed and the epoch of the loader that reads it.

    The datasets here implement it, so that a :class:`Map` inside a :class:`Subset` knows the epoch;
    a dataset of your own that wraps one of them should, too.
    """

    def seeded(self, seed: int, epoch: int) -> Any:
        """This dataset as it is in that epoch. The original stays as it was."""


def seeded(dataset: Any, seed: int, epoch: int) -> Any:
    """``dataset`` as it is in that epoch; one without random draws is returned as it is."""
    return dataset.seeded(seed, epoch) if isinstance(dataset, SeededDataset) else dataset


def is_dataset(data: Any) -> bool:
    """Whether ``data`` has rows that can be asked for by index."""
    # PyTorch's IterableDataset inherits a __getitem__ that only raises, and may have a length.
    if any(kind.__name__ == "IterableDataset" for kind in type(data).__mro__):
        return False
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def rows_of(data: Any) -> Any:
    """``data`` as a dataset: arrays, tuples and dicts of them, Arrow tables, mlx-data's streams.

    Raises:
        ConfigurationError: it is text, whose characters nobody means as rows.
    """
    if isinstance(data, str | bytes):
        raise ConfigurationError(
            f"dataset is the {type(data).__name__} {data!r:.60}; expected arrays or a dataset. To "
            "read a file use read_csv, open_arrays, open_table or ImageFolder of mlx_fit.data, or "
            "mlx_fit.text.TextDataset."
        )
    if is_arrow_table(data):
        return open_table(data)
    if is_mlx_stream(data):
        return from_mlx_data(data)
    is_tree = isinstance(data, tuple | dict) or (is_array(data) and not isinstance(data, list))
    return ArrayDataset(data) if is_tree else data


class ArrayDataset:
    """Rows of arrays that share their leading length.

    A row, and a batch of rows, has the structure of ``arrays``. Nothing is copied at construction,
    so memory-mapped arrays stay on disk: float64 becomes float32 as rows are read. Columns of
    strings are read as Python lists.

    Args:
        arrays: an array of shape ``(rows, ...)`` (NumPy, MLX, anything with ``__array__``, a list
            of numbers), or a tuple, list or dict of such, nested as you like.

    Raises:
        DataError: lengths differ, or a part is not an array with rows.

    Example:
        >>> import numpy as np
        >>> from mlx_fit.data import ArrayDataset
        >>> dataset = ArrayDataset({"image": np.zeros((3, 28, 28)), "label": [5, 6, 7]})
        >>> len(dataset), int(dataset[1]["label"])
        (3, 6)
    """

    def __init__(self, arrays: Any) -> None:
        columns = [(path or "x", _column(path or "x", leaf)) for path, leaf in flatten(arrays)]
        self._length = _common_length(columns)
        self._columns = [(array, batch_dtype(array.dtype)) for _, array in columns]
        self._structure = skeleton(arrays)
        # The usual structures are put together in place, without a walk through the tree.
        shape = self._structure
        self._is_bare = shape is None
        self._is_pair = type(shape) is tuple and not any(shape)
        self._keys = list(shape) if isinstance(shape, dict) and not any(shape.values()) else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        """Row ``index``: arrays of shape ``(...)``."""
        index = operator.index(index)
        rows: list[Any] = []
        for array, dtype in self._columns:
            value = array[index]
            rows.append(value if dtype is None else value.astype(dtype))
        return unflatten(self._structure, iter(rows))

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """A batch, ``(len(indices), ...)``: copies, by one index operation per array."""
        # No helpers and no comprehensions here: each would cost a call per batch.
        selection: Any = indices
        is_slice = False
        if isinstance(indices, range) and indices.step == 1:
            selection, is_slice = slice(indices.start, indices.stop), True
        rows: list[Any] = []
        for array, dtype in self._columns:
            taken = array[selection]
            rows.append(taken.tolist() if dtype is None else taken.astype(dtype, copy=is_slice))
        if self._is_bare:
            return rows[0]
        if self._is_pair:
            return tuple(rows)
        if self._keys is not None:
            return dict(zip(self._keys, rows, strict=True))
        return unflatten(self._structure, iter(rows))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps a memory-mapped file anew, instead of being sent what is in it.
        arrays = [by_file(array) for array, _ in self._columns]
        return ArrayDataset, (unflatten(self._structure, iter(arrays)),)

    def part(self, start: int, stop: int) -> ArrayDataset:
        """The rows from ``start`` to before ``stop``, over the same memory."""
        arrays = [array[start:stop] for array, _ in self._columns]
        return ArrayDataset(unflatten(self._structure, iter(arrays)))


def _column(path: str, leaf: Any) -> np.ndarray:
    if not is_array(leaf):
        raise DataError(
            f"{path} is {_describe(leaf)}; expected an array with rows (NumPy, MLX, or anything "
            "with __array__). Pass a dataset by itself, not together with other arrays; of a "
            "column of a Hugging Face dataset pass column[:].",
            field=path,
        )
    try:
        array = to_numpy(leaf)
    except ValueError as error:
        raise DataError(f"{path} cannot be made an array: {error}", field=path) from error
    if array.ndim == 0:
        raise DataError(f"{path} is a scalar; expected an array with rows.", field=path)
    return array


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _common_length(columns: list[tuple[str, np.ndarray]]) -> int:
    if not columns:
        raise DataError("The data holds no array; give at least one array with rows.")
    first, length = columns[0][0], len(columns[0][1])
    for path, array in columns[1:]:
        if len(array) != length:
            raise DataError(
                f"{first} has {length} rows, but {path} has {len(array)}; arrays of one data set "
                "need the same number of rows.",
                field=path,
            )
    return length


class Subset:
    """The rows of ``dataset`` at ``indices``, in that order.

    Args:
        dataset: a dataset, or arrays as for :class:`ArrayDataset`.
        indices: integers of shape ``(rows,)``.

    Raises:
        ConfigurationError: ``indices`` are something else, such as a boolean mask.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | np.ndarray) -> None:
        self.dataset = rows_of(dataset)
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            # NumPy would read a mask as rows 0 and 1, and cut off fractions.
            raise ConfigurationError(
                f"Subset got indices of dtype {given.dtype} and shape {given.shape}; expected "
                "integers of shape (rows,). Of a boolean mask pass numpy.flatnonzero(mask)."
            )
        self.indices = given.astype(np.int64, copy=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """The batch of the dataset below where it gives whole batches, else a list of its rows."""
        chosen = self.indices[np.asarray(indices, dtype=np.int64)]
        if isinstance(self.dataset, ArrayDataset):
            return self.dataset.__getitems__(chosen)
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(chosen.tolist())
        return [self.dataset[index] for index in chosen.tolist()]

    def seeded(self, seed: int, epoch: int) -> Subset:
        """See :class:`SeededDataset`."""
        return Subset(seeded(self.dataset, seed, epoch), self.indices)


class ConcatDataset:
    """The rows of several datasets, one after the other.

    Args:
        datasets: datasets, or arrays as for :class:`ArrayDataset`.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        if not isinstance(datasets, Iterable) or (
            is_array(datasets) and not isinstance(datasets, list)
        ):
            raise ConfigurationError(
                f"ConcatDataset got a {type(datasets).__name__}; expected a list of datasets, such "
                "as ConcatDataset([first, second])."
            )
        self.datasets = [rows_of(dataset) for dataset in datasets]
        for dataset in self.datasets:
            if not is_dataset(dataset):
                raise ConfigurationError(
                    f"ConcatDataset got a {type(dataset).__name__} among its datasets; expected "
                    "datasets with a length and rows by index."
                )
        self._ends = list(itertools.accumulate(map(len, self.datasets)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # counts negative indices, raises IndexError
        which = bisect.bisect_right(self._ends, index)
        return self.datasets[which][index - (self._ends[which - 1] if which else 0)]

    @property
    def gives_batches(self) -> bool:
        """Whether a part of it reads several rows faster than one by one."""
        return any(hasattr(dataset, "__getitems__") for dataset in self.datasets)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """A batch of arrays where the parts give arrays that are alike, else a list of its rows."""
        wanted = np.asarray(indices, dtype=np.int64)
        which = np.searchsorted(self._ends, wanted, side="right")
        places, batches = [], []
        for part in np.unique(which).tolist():
            place = np.flatnonzero(which == part)
            own = wanted[place] - (self._ends[part - 1] if part else 0)
            places.append(place)
            batches.append(Subset(self.datasets[part], own).__getitems__(np.arange(len(own))))
        if len(batches) == 1:
            return batches[0]
        if all(isinstance(batch, list) for batch in batches):
            return list(_in_order(places, batches))
        if batches and all(_is_alike(batch, batches[0]) for batch in batches):
            back = np.argsort(np.concatenate(places))
            columns = zip(*([leaf for _, leaf in flatten(batch)] for batch in batches), strict=True)
            merged = (np.concatenate(column)[back] for column in columns)
            return unflatten(skeleton(batches[0]), merged)
        return [self[index] for index in wanted.tolist()]

    def seeded(self, seed: int, epoch: int) -> ConcatDataset:
        """See :class:`SeededDataset`."""
        return ConcatDataset([seeded(dataset, seed, epoch) for dataset in self.datasets])


def _in_order(places: list[np.ndarray], batches: list[list[Any]]) -> Iterator[Any]:
    rows = dict(zip(np.concatenate(places).tolist(), itertools.chain(*batches), strict=True))
    return (rows[place] for place in range(len(rows)))


def _is_alike(batch: Any, other: Any) -> bool:
    """Whether two batches have arrays of the same names, types and shapes of rows."""
    one, two = flatten(batch), flatten(other)
    return skeleton(batch) == skeleton(other) and all(
        isinstance(a, np.ndarray)
        and isinstance(b, np.ndarray)
        and (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])
        for (_, a), (_, b) in zip(one, two, strict=True)
    )


class Transformed(ABC):
    """A dataset with a function applied to it, with random numbers of the loader's choice.

    Args:
        dataset: a dataset, or arrays as for :class:`ArrayDataset`.
        f: what is applied, with a ``numpy.random.Generator`` as its second argument.
        seed, epoch: what is drawn when rows are read without a loader.

    Raises:
        ConfigurationError: ``dataset`` has no rows by index.
    """

    def __init__(
        self,
        dataset: Any,
        f: Callable[[Any, np.random.Generator], Any],
        *,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        self.dataset = rows_of(dataset)
        self.f = f
        self.seed = seed
        self.epoch = epoch
        if not is_dataset(self.dataset):
            raise ConfigurationError(
                f"{type(self).__name__} got a {type(dataset).__name__}; expected a dataset with "
                "__len__ and __getitem__. For an iterable, apply the function where it yields, or "
                "in collate_fn."
            )
        if not callable(f):
            raise ConfigurationError(
                f"{type(self).__name__} got f={f!r}; expected a function of data and a "
                "numpy.random.Generator."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Row ``index``, transformed."""

    def seeded(self, seed: int, epoch: int) -> Transformed:
        """See :class:`SeededDataset`."""
        return type(self)(seeded(self.dataset, seed, epoch), self.f, seed=seed, epoch=epoch)


class Map(Transformed):
    """``f(sample, rng)`` for each row of ``dataset``: preprocessing and augmentation.

    ``rng`` is ``numpy.random.default_rng([seed, epoch, index])``, with the seed and the epoch of
    the :class:`DataLoader` and the row's index in ``dataset``. So a row is augmented differently
    in each epoch, and always alike in a repeated or resumed run. A ``Map`` of a ``Map`` goes on
    with the same generator.

    Args:
        dataset: a dataset, or arrays as for :class:`ArrayDataset`.
        f: called with a row and a ``numpy.random.Generator``; its result is the new row.
        seed, epoch: what is drawn when rows are read without a loader.

    Example:
        >>> import numpy as np
        >>> from mlx_fit.data import Map
        >>> noisy = Map(np.zeros((4, 2)), lambda row, rng: row + rng.normal(size=row.shape))
        >>> noisy[0].shape
        (2,)
    """

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # counts negative indices, raises IndexError
        return self._draw(index, np.random.default_rng([self.seed, self.epoch, index]))

    def _draw(self, index: int, rng: np.random.Generator) -> Any:
        inner = self.dataset
        sample = inner._draw(index, rng) if isinstance(inner, Map) else inner[index]
        return self.f(sample, rng)


def exact_fraction(value: float) -> Any:
    """The fraction that a float was written for: 0.3 is 3/10, so that 0.3 * 10 rows are 3."""

    from fractions import Fraction  # slow to import, and used once a run

    return Fraction(value).limit_denominator(10**9)


def random_split(
    dataset: Any, lengths_or_fractions: Sequence[int] | Sequence[float], seed: int = 0
) -> list[Subset]:
    """Split a dataset into random parts that do not overlap.

    Args:
        dataset: a dataset, or arrays as for :class:`ArrayDataset`.
        lengths_or_fractions: whole numbers that add up to ``len(dataset)``, or floats that add up
            to 1: each part gets its share rounded down, and the rows left over go one each to the
            first parts (as in PyTorch).
        seed: the same seed gives the same parts.

    Raises:
        ConfigurationError: the parts do not add up, or one would be empty.

    Example:
        >>> from mlx_fit.data import random_split
        >>> train, test = random_split(list("abcdefghij"), [0.75, 0.25], seed=0)
        >>> len(train), len(test)
        (8, 2)
    """
    rows = rows_of(dataset)
    if not isinstance(lengths_or_fractions, Iterable):
        raise ConfigurationError(
            f"random_split got {lengths_or_fractions!r}; lengths_or_fractions must be a list with "
            "a length or a fraction for each part, such as [0.9, 0.1]."
        )
    lengths = _lengths([*lengths_or_fractions], len(rows))
    shuffled = order(seed, 0, len(rows))[:]
    ends = itertools.accumulate(lengths)
    return [
        Subset(rows, shuffled[end - length : end])
        for length, end in zip(lengths, ends, strict=True)
    ]


def _lengths(parts: Sequence[int] | Sequence[float], num_rows: int) -> list[int]:
    lengths: list[int]
    if all(isinstance(part, float) for part in parts) and math.isclose(sum(parts), 1.0):
        lengths = [math.floor(exact_fraction(part) * num_rows) for part in parts]
        for position in range(num_rows - sum(lengths)):
            lengths[position % len(lengths)] += 1
    elif all(isinstance(part, int | np.integer) for part in parts) and sum(parts) == num_rows:
        lengths = [int(part) for part in parts]
    else:
        raise ConfigurationError(
            f"random_split got {list(parts)} for {num_rows} rows; lengths_or_fractions must be "
            f"whole numbers that add up to {num_rows}, or floats that add up to 1."
        )
    if min(lengths) < 1:
        raise ConfigurationError(
            f"random_split got {list(parts)} for {num_rows} rows: the parts would have {lengths} "
            "rows. Change lengths_or_fractions so that none is empty."
        )
    return lengths
