"""What is in a checkpoint: a folder of safetensors files and a ``state.json``, written last.

``state.json`` holds everything that is not an array, size and SHA-256 of every other file, and, as
its last entry, the SHA-256 of its own text before that entry. No pickle: reading runs no code.

Imports layer 2: checkpoint.arrays, checkpoint.codec.
"""

from __future__ import annotations

import json
import os
import platform
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit._tree import named_arrays
from mlx_fit._version import __version__
from mlx_fit.checkpoint.arrays import read_file, sha256_of, verify_file, write_file
from mlx_fit.checkpoint.codec import Encoder, decode
from mlx_fit.errors import CheckpointCorruptError, CheckpointError
from mlx_fit.state import TrainState, sync_folder

FORMAT = 1
STATE = "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
WINDOW, CALLBACKS, SUMS = "accumulator.safetensors", "callbacks.safetensors", "metrics.safetensors"
BUFFERS = "buffers.safetensors"
FILES = (MODEL, BUFFERS, OPTIMIZER, WINDOW, CALLBACKS, SUMS)
INLINE = 4096  # metric sums up to so many numbers are written into state.json
LARGEST_STATE = 1 << 30  # bytes of a state.json; more is no state of ours
COUNTERS = ("step", "epoch", "order_seed", "num_passes")
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


@dataclass
class Snapshot:
    """A checkpoint in memory: later training does not change it.

    Attributes:
        document: what goes into ``state.json``, but for the files.
        files: file -> its arrays, evaluated.
        finite: names of weights and optimizer arrays that must not hold NaN or infinity.
        frozen: frozen parameters that are not written; only their hashes are.
    """

    document: dict[str, Any]
    files: dict[str, dict[str, mx.array]]
    finite: dict[str, set[str]]
    frozen: dict[str, mx.array] = field(default_factory=dict)


def take_snapshot(state: TrainState, expected: Iterable[str] = ()) -> Snapshot:
    """Keep references to the state's arrays, which never change, and copies of all else.

    Args:
        state: what to save.
        expected: names of frozen parameters of which only the hashes are written.
    """
    trainer = state.trainer
    weights = dict(trainer["model"])
    kept = {name: weights.pop(name) for name in expected}
    encoders = {CALLBACKS: Encoder(), SUMS: Encoder(INLINE)}
    plain = Encoder(INLINE)
    document = {
        "format": FORMAT,
        "step": trainer["step"],
        "epoch": trainer["epoch"],
        "batch": (state.position or {}).get("num_batches", 0),
        "values": plain.encode(state.values, "values"),
        "random_key": trainer["random_key"],
        "order_seed": trainer["order_seed"],
        "num_passes": trainer["num_passes"],
        "micro_batch_size": trainer.get("micro_batch_size"),
        "loss_scale": plain.encode(trainer["loss_scale"], "loss_scale"),
        "position": plain.encode(state.position, "position"),
        "sums": encoders[SUMS].encode(state.sums, "sums"),
        "trainable": list(state.trainable),
        "arguments": plain.encode(state.arguments, "arguments"),
        "versions": versions(),
        "callbacks": encoders[CALLBACKS].encode(state.callbacks, "callbacks"),
        "history": plain.encode(state.history, "history"),
    }
    files = {MODEL: weights, OPTIMIZER: dict(trainer["optimizer"])}
    if trainer["buffers"]:
        files[BUFFERS] = dict(trainer["buffers"])
    if state.window:
        files[WINDOW] = dict(state.window)
    files |= {name: encoder.arrays for name, encoder in encoders.items() if encoder.arrays}
    mx.eval(files, kept)  # host synchronisation: the writer's thread must find finished arrays
    finite = {MODEL: {*state.trainable} & weights.keys(), OPTIMIZER: {*trainer["optimizer"]}}
    return Snapshot(document, files, finite, kept)


def frozen_names(model: nn.Module) -> list[str]:
    """Parameters that training leaves alone: those of layers in which everything is frozen.

    Running statistics change without being trained, so a BatchNorm always counts as trained.
    """
    trained = {name for name, _ in named_arrays(model.trainable_parameters())}
    names: list[str] = []
    for prefix, module in model.named_modules():
        own = {key: value for key, value in module.items() if isinstance(value, mx.array)}
        public = [f"{prefix}.{key}" if prefix else key for key in own if not key.startswith("_")]
        if public and not isinstance(module, nn.BatchNorm) and trained.isdisjoint(public):
            names += public
    present = {name for name, _ in named_arrays(model.parameters())}
    return [name for name in dict.fromkeys(names) if name in present]


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a run."""
    return {
        "mlx_fit": __version__,
        "mlx": str(mx.__version__),  # type: ignore[attr-defined]
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(mx.default_device().type).rpartition(".")[2],
    }


def write_checkpoint(folder: Path, snapshot: Snapshot, hashes: dict[str, str]) -> None:
    """Write a snapshot into a new folder: arrays first, then ``state.json``, all synced to disk.

    Args:
        folder: does not exist yet.
        snapshot: what to write.
        hashes: SHA-256 of frozen parameters by name, filled as they become known.

    Raises:
        NonFiniteArrays: weights or optimizer state hold NaN or infinity.
        OSError: it could not be written.
    """
    folder.mkdir(parents=True)
    for name in snapshot.frozen.keys() - hashes.keys():
        hashes[name] = sha256_of(snapshot.frozen[name])
    frozen = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": hashes[name]}
        for name, array in snapshot.frozen.items()
    }
    files = {
        name: write_file(folder / name, arrays, snapshot.finite.get(name, ()))
        for name, arrays in snapshot.files.items()
    }
    document = {**snapshot.document, "frozen": frozen, "files": files}
    with (folder / STATE).open("xb") as file:
        file.write(_sealed(document))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _sealed(document: Mapping[str, Any]) -> bytes:
    import hashlib  # slow to import: it loads OpenSSL

    lines = [f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in document.items()]
    text = ("{\n" + ",\n".join(lines)).encode()
    digest = hashlib.sha256(text).hexdigest()
    return text + f',\n  "sha256": "{digest}"\n}}\n'.encode()


def read_document(folder: Path) -> dict[str, Any]:
    """The contents of ``state.json``, checked against its own hash.

    Raises:
        CheckpointError: there is none: not a checkpoint, or one that was never finished.
        CheckpointCorruptError: it is damaged, or no state of ours.
    """
    import hashlib  # slow to import: it loads OpenSSL

    path = folder / STATE
    try:
        found = path.lstat()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: it has no {STATE}, which is written last.",
            path=folder,
        ) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_STATE:
        raise _corrupt(path, "a regular file", f"mode {found.st_mode:o}, {found.st_size} bytes")
    text = path.read_bytes()
    seal = _SEAL.search(text)
    if seal is None:
        raise _corrupt(path, "a last entry with the hash of the text before it", "none")
    digest = hashlib.sha256(text[: seal.start()]).hexdigest().encode()
    if digest != seal[1]:
        raise _corrupt(path, seal[1].decode(), digest.decode())
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "JSON", str(error)) from error
    _check(path, document)
    return document


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check(path: Path, document: Any) -> None:
    """Raise unless everything is of the kind that it should be; hashes prove no good will."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise _corrupt(path, f"format {FORMAT}", f"format {found!r}: another version wrote it")
    kinds: dict[str, Any] = {
        **dict.fromkeys(COUNTERS, int),
        **dict.fromkeys(("loss_scale", "arguments", "versions", "callbacks", "values"), dict),
        **dict.fromkeys(("position", "history", "sums"), (dict, type(None))),
        **dict.fromkeys(("frozen", "files"), dict),
        **dict.fromkeys(("trainable", "random_key"), list),
    }
    for name, kind in kinds.items():
        if not isinstance(document.get(name), kind):
            raise _corrupt(path, f"{name} of another kind", repr(document.get(name))[:80])
    key = document["random_key"]
    if len(key) != 2 or not all(isinstance(word, int) and 0 <= word < 2**32 for word in key):
        raise _corrupt(path, "random_key of two 32-bit words", repr(key)[:80])
    if any(document[name] < 0 for name in COUNTERS):
        raise _corrupt(path, "counters that are not negative", "a negative one")
    size = document.get("micro_batch_size")  # absent before batches could be split
    if size is not None and (type(size) is not int or size < 1):
        raise _corrupt(path, "micro_batch_size of at least 1", repr(size)[:80])
    files = document["files"]
    if not {MODEL, OPTIMIZER} <= files.keys() or not files.keys() <= {*FILES}:
        raise _corrupt(path, f"files among {', '.join(FILES)}", f"{', '.join(files)[:200]}")
    for name, facts in files.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("size"), int):
            raise _corrupt(path, f"size and hash of {name}", repr(facts)[:80])
        if not isinstance(facts.get("sha256"), str):
            raise _corrupt(path, f"size and hash of {name}", repr(facts)[:80])


def _corrupt(path: Path, expected: str, got: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{path} is damaged: expected {expected}, found {got}. Use an earlier checkpoint.",
        path=path,
        expected=expected,
        got=got,
    )


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Compare every file with its hash, and return what ``state.json`` says.

    Raises:
        CheckpointError: a part is missing.
        CheckpointCorruptError: a part is damaged.
    """
    document = read_document(folder)
    for name, expected in document["files"].items():
        verify_file(folder / name, expected)
    return document


def read_checkpoint(folder: Path, document: Mapping[str, Any] | None = None) -> TrainState:
    """Everything a checkpoint holds, each file compared with its hash.

    ``TrainState.trainer["frozen"]`` holds what is known of frozen parameters that it leaves out.

    Raises:
        CheckpointError: a part is missing.
        CheckpointCorruptError: a part is damaged.
    """
    document = read_document(folder) if document is None else document
    arrays = {name: read_file(folder / name, facts) for name, facts in document["files"].items()}

    def decoded(key: str, file: str = "") -> Any:
        try:
            return decode(document[key], arrays.get(file, {}))
        except (CheckpointCorruptError, RecursionError) as error:
            raise _corrupt(folder / STATE, f"{key} that can be read", str(error)) from error

    trainer = {
        "model": arrays[MODEL],
        "buffers": arrays.get(BUFFERS, {}),
        "optimizer": arrays[OPTIMIZER],
        "loss_scale": decoded("loss_scale"),
        "random_key": document["random_key"],
        "frozen": document["frozen"],
        "micro_batch_size": document.get("micro_batch_size"),
        **{name: document[name] for name in COUNTERS},
    }
    return TrainState(
        trainer,
        document["trainable"],
        decoded("position"),
        arrays.get(WINDOW, {}),
        decoded("sums", SUMS),
        decoded("callbacks", CALLBACKS),
        decoded("history"),
        decoded("arguments"),
        decoded("values"),
        document["versions"],
    )
