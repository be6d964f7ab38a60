"""The data of ``mlx-fit train``: files by their suffix, the digits, and what code makes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fit import data, datasets, text
from mlx_fit.cli.objects import USE, Names, find_file
from mlx_fit.cli.settings import UsageError, known
from mlx_fit.cli.train_config import PARTS
from mlx_fit.data.data_module import is_data_module
from mlx_fit.errors import DataError

ARRAYS, TABLES, CSV = (".npz",), (".parquet", ".arrow", ".feather"), (".csv", ".csv.gz", ".tsv")
FILES = (*ARRAYS, *CSV, *TABLES)


def data_names(folder: Path) -> Names:
    """The readers, data sets and loaders of this library, and the digits."""
    known = {name: getattr(data, name) for name in data.__all__}
    known |= {name: getattr(text, name) for name in text.__all__}
    return Names("data", {"digits": datasets.digits, **known}, folder, read_file)


def make_data(given: Any, folder: Path) -> dict[str, Any]:
    """What is trained, validated and tested on: those of ``PARTS`` that there are.

    A data module is the part ``train``, from which ``fit`` asks for the others.

    Args:
        given: the table ``data``, or a text that stands for all of it.
        folder: that of the settings.

    Raises:
        UsageError: a file or a name does not exist.
        DataError: a file does not hold what it should.
    """
    names = data_names(folder)
    if isinstance(given, Mapping) and USE not in given:
        if "train" not in given:
            raise UsageError("data: there is no train, such as train = 'digits'.")
        return {part: make_part(given[part], names, f"data.{part}") for part in given}
    whole = make_part(given, names, "data")
    if isinstance(whole, Mapping):
        return _parts_of(whole)
    return {"train": whole} | ({"test": whole} if _tests(whole) else {})


def _tests(whole: Any) -> bool:
    return is_data_module(whole) and callable(getattr(whole, "test_dataloader", None))


def _parts_of(whole: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in whole if key not in PARTS]
    if unknown or "train" not in whole:
        raise UsageError(
            f"data: expected a data module, or a dict of train, validation and test; it has "
            f"{', '.join(map(str, whole)) or 'nothing'}."
        )
    return dict(whole)


def make_part(given: Any, names: Names, where: str) -> Any:
    """One part: a file, a name, or a table of either with arguments."""
    table = dict(given) if isinstance(given, Mapping) else {USE: given}
    name = table.get(USE)
    if is_file_of_data(name):
        return read_file(table, where, names)
    if isinstance(name, str) and ":" not in name and name not in names.known and "." in name:
        raise UsageError(
            f"{where}: {name} is of no kind that is read here: {', '.join(FILES)}. Others are read "
            "by a function of yours, as 'file.py:function'."
        )
    found = names.find(name, where)
    is_made = isinstance(given, Mapping) or callable(found)
    return names.call(found, table, where) if is_made else found


def is_file_of_data(name: Any) -> bool:
    """Whether a name is that of a file which is read here."""
    return isinstance(name, str) and ":" not in name and name.endswith(FILES)


def read_file(table: dict[str, Any], where: str, names: Names) -> Any:
    """What is in a file, read with the arguments in its table; None for a name of another kind."""
    name = table[USE]
    if not is_file_of_data(name):
        return None
    path = find_file(name, where, names.folder)
    if name.endswith(ARRAYS):
        return read_npz(path, {k: v for k, v in table.items() if k != USE}, where)
    reader, key = (data.open_table, "source") if name.endswith(TABLES) else (data.read_csv, "path")
    if key in table:
        raise UsageError(f"{where}.{key}: the file is {name} already. Leave {key} out.")
    if name.endswith(".tsv"):
        table = {"delimiter": "\t", **table}
    return names.call(reader, {key: path, **table}, where)


def read_npz(path: Path, options: Mapping[str, Any], where: str) -> tuple[np.ndarray, ...]:
    """``(x, y)`` or ``(x, y, weights)`` from NumPy's archive.

    Args:
        path: the file.
        options: names of the arrays: ``x``, ``y``, ``weights``; by default their own names, the
            last one where it is there.
        where: the key it stands under, for messages.
    """
    roles = ("x", "y", "weights")
    if wrong := [key for key in options if key not in roles]:
        raise UsageError(f"{where}: there is no setting {wrong[0]!r}.{known(wrong[0], roles)}")
    if not zipfile.is_zipfile(path):
        raise DataError("cannot be read as .npz: np.savez did not write it.", path=path)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {role: options.get(role, role) for role in roles}
            if "weights" not in options and "weights" not in file:
                del found["weights"]
            missing = [name for name in found.values() if name not in file]
            if missing:
                raise UsageError(
                    f"{where}: {path.name} has no array {missing[0]!r}, it has "
                    f"{', '.join(file) or 'none'}. Say which: x = 'images', y = 'labels'."
                )
            return tuple(file[name] for name in found.values())
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UsageError):
            raise
        raise DataError(f"cannot be read as .npz: {error}", path=path) from error
