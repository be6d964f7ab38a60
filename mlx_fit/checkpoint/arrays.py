"""Arrays in safetensors files: written and hashed in one pass, read only when the hash agrees."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import CheckpointCorruptError, CheckpointError

CHUNK = 1 << 22  # bytes: small enough for a cache, where hash and check find them again
_NAMES = {
    mx.bool_: "BOOL",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.float64: "F64",
    mx.complex64: "C64",
}
# Where all bits of the exponent are set, a half-precision number is infinite or NaN.
_HALF_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80}


class NonFiniteArrays(Exception):
    """Arrays that were to be written hold NaN or infinity. ``names`` lists them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        super().__init__(", ".join(names))


def write_file(
    path: Path, arrays: Mapping[str, mx.array], finite: Collection[str] = ()
) -> dict[str, Any]:
    """Write evaluated arrays to a new safetensors file, synced to disk.

    Only NumPy and the file system are used, so that a thread may do it while another trains.

    Args:
        path: a file that does not exist yet.
        arrays: name -> array.
        finite: names of those in which NaN and infinity are refused.

    Returns:
        ``{"size": bytes, "sha256": hex digest}``.

    Raises:
        NonFiniteArrays: some of ``finite`` are not. The file is left unfinished.
        OSError: it could not be written.
    """
    import hashlib  # slow to import: it loads OpenSSL

    views = {
        name: (_NAMES[array.dtype], array.shape, view(array)) for name, array in arrays.items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for name, (dtype, shape, data) in views.items():
        stop = start + data.nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    bad: list[str] = []
    with path.open("xb", buffering=0) as file:
        size = _append(file, digest, len(text).to_bytes(8, "little") + text)
        for name, (dtype, _, data) in views.items():
            is_good = True
            for chunk in _chunks(data):
                if name in finite and is_good:
                    is_good = _is_finite(chunk, dtype)
                size += _append(file, digest, chunk.data)
            bad += [] if is_good else [name]
        if bad:
            raise NonFiniteArrays(bad)
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def view(array: mx.array) -> np.ndarray:
    """An evaluated array's numbers in order, without a copy where they lie so; bfloat16 as bits."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(bits, copy=False)).reshape(-1)


def _chunks(data: np.ndarray) -> list[np.ndarray]:
    step = CHUNK // data.itemsize
    return [data[i : i + step] for i in range(0, data.size, step)]


def _append(file: Any, digest: Any, data: Any) -> int:
    data = memoryview(data).cast("B") if not isinstance(data, bytes) else data
    written = 0
    while written < len(data):  # an unbuffered file may take less than it was given
        written += file.write(data[written:])
    digest.update(data)
    return len(data)


def _is_finite(chunk: np.ndarray, dtype: str) -> bool:
    if dtype in _HALF_EXPONENTS:
        mask = np.uint16(_HALF_EXPONENTS[dtype])
        return not bool(((chunk.view(np.uint16) & mask) == mask).any())
    return chunk.dtype.kind not in "fc" or bool(np.isfinite(chunk).all())


def sha256_of(array: mx.array) -> str:
    """The SHA-256 of an evaluated array's bytes."""
    import hashlib  # slow to import: it loads OpenSSL

    digest = hashlib.sha256()
    for chunk in _chunks(view(array)):
        digest.update(chunk.data)
    return digest.hexdigest()


def verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Compare a file with its size and hash.

    Raises:
        CheckpointError: it is missing.
        CheckpointCorruptError: it is no regular file, or has another size or hash.
    """
    import hashlib  # slow to import: it loads OpenSSL

    try:
        found = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path} is missing: {error}.", path=path) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        raise CheckpointCorruptError(
            f"{path} is {kind}; a checkpoint holds plain files only.",
            path=path,
            expected="a regular file",
            got=kind,
        )
    if found.st_size != expected["size"]:
        raise _differs(path, "bytes", expected["size"], found.st_size)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected["sha256"]:
        raise _differs(path, "SHA-256", expected["sha256"], digest)


def _differs(path: Path, what: str, expected: Any, got: Any) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{path} is damaged: its {what} should be {expected}, found {got}. Use an earlier "
        "checkpoint.",
        path=path,
        expected=expected,
        got=got,
    )


def read_file(path: Path, expected: Mapping[str, Any]) -> dict[str, mx.array]:
    """Read a safetensors file into memory after comparing it with its size and hash.

    Raises:
        CheckpointError: it is missing.
        CheckpointCorruptError: it is not what was written, or no sound safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    verify_file(path, expected)
    try:
        # The hash comes from the same folder: a hostile header may agree with it.
        with safe_open(str(path), framework="np") as file:
            file.keys()
        arrays = mx.load(str(path), format="safetensors")
        mx.eval(arrays)  # mx.load is lazy, and the file may be replaced later
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointCorruptError(
            f"{path} is no sound safetensors file: {error}.",
            path=path,
            expected="a safetensors file",
            got=str(error),
        ) from error
    assert isinstance(arrays, dict)
    return arrays
