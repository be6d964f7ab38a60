"""Arrays in files, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format

from mlx_fit.checks import path_of
from mlx_fit.errors import DataError

if TYPE_CHECKING:
    import zipfile

__all__ = ["by_file", "open_arrays"]

_STORED = 0  # zipfile.ZIP_STORED
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name


def open_arrays(path: str | Path) -> Any:
    """The array of an ``.npy`` file, or those of an ``.npz`` file by name, without reading them.

    The arrays are memory-mapped and read-only, so files may be larger than memory, and worker
    processes share them. Members of an ``.npz`` that was saved compressed (``savez_compressed``)
    cannot be mapped, and are read into memory.

    Args:
        path: the file. Its content decides, not its name.

    Returns:
        ``numpy.memmap`` of any shape, or a dict of these: as they are for :class:`ArrayDataset`,
        :class:`DataLoader` and ``fit``.

    Raises:
        DataError: the file cannot be read, or holds Python objects; ``path`` and, in an ``.npz``,
            ``field`` say which.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from mlx_fit.data import DataLoader, open_arrays
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.npz"
        >>> np.savez(path, x=np.zeros((10, 3)), y=np.arange(10))
        >>> batch = next(iter(DataLoader(open_arrays(path), batch_size=4)))
        >>> batch["x"].shape, batch["y"].tolist()
        ((4, 3), [0, 1, 2, 3])
    """
    import zipfile  # slow to import

    path = path_of("path", path)
    field: str | None = None
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                return _mapped(path, file, 0)
            arrays: dict[str, Any] = {}
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    field = info.filename.removesuffix(".npy")
                    arrays[field] = _member(path, file, archive, info)
            return arrays
    except Exception as error:  # NumPy hands on what Python's tokenizer, zlib and others raise
        where = f"{field}: " if field else ""
        raise DataError(
            f"{where}cannot be read as a NumPy file: {error} Expected what np.save, np.savez or "
            "np.savez_compressed wrote, without Python objects.",
            path=path,
            field=field,
        ) from error


def _member(path: Path, file: Any, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type != _STORED:
        with archive.open(info) as member:
            return npy_format.read_array(member, allow_pickle=False)
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return _mapped(path, file, info.header_offset + _LOCAL_HEADER + lengths)


def _mapped(path: Path, file: Any, start: int) -> np.ndarray:
    """The array whose ``.npy`` form begins at byte ``start`` of the file."""
    file.seek(start)
    version = npy_format.read_magic(file)
    read_header = {
        (1, 0): npy_format.read_array_header_1_0,
        (2, 0): npy_format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"its format version is {version}, not (1, 0) or (2, 0).")
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects.")
    if 0 in shape:
        return np.zeros(shape, dtype)  # nothing cannot be mapped
    order: Any = "F" if is_fortran else "C"
    return np.memmap(path, dtype, "r", file.tell(), shape, order)


class _ByFile:
    """Pickles as a place in a file, and is unpickled as a mapping of it."""

    def __init__(self, *place: Any) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return np.memmap, self._place


def by_file(array: np.ndarray) -> Any:
    """What to pickle for ``array``: a place where it is mapped from a file, else itself."""
    root: Any = array
    while isinstance(root, np.ndarray) and not (
        isinstance(root, np.memmap) and not isinstance(root.base, np.ndarray)
    ):
        root = root.base
    # Another mode, copy on write, may hold changes that are not in the file.
    if not isinstance(root, np.memmap) or root.mode not in ("r", "r+", "w+"):
        return array
    if root.filename is None or not array.flags.c_contiguous or not array.size:
        return array
    offset = root.offset + _address(array) - _address(root)
    return _ByFile(root.filename, array.dtype, "r", offset, array.shape)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
