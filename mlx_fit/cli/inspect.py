"""Show what a checkpoint holds, verify its hashes, or compare two."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.checkpoint.arrays import read_file
from mlx_fit.checkpoint.format import FILES, STATE, read_document, verify_checkpoint
from mlx_fit.checkpoint.store import CheckpointStore
from mlx_fit.errors import CheckpointError
from mlx_fit.runtime.memory import format_bytes

SHOWN = 40  # lines of a comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlx-fit inspect``."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of them")
    parser.add_argument(
        "other", type=Path, nargs="?", help="another one to compare it with, of a folder the newest"
    )
    parser.add_argument("--arrays", action="store_true", help="list every array")


def run(arguments: argparse.Namespace) -> int:
    """Show, verify or compare. 1 if the two that are compared differ."""
    path, other = arguments.checkpoint, arguments.other
    for folder in (path, other):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; expected a checkpoint.", path=folder)
    if other is not None:
        return _compare(*(_newest_of(folder) for folder in (path, other)))
    if not (path / STATE).exists():
        if not (steps := CheckpointStore(path).steps()):
            raise CheckpointError(f"{path} holds no checkpoint.", path=path)
        return _show_all(steps.values())
    _show(path, arguments.arrays)
    return 0


def _newest_of(folder: Path) -> Path:
    """A checkpoint itself; of a folder of them the newest."""
    steps = {} if (folder / STATE).exists() else CheckpointStore(folder).steps()
    return list(steps.values())[-1] if steps else folder


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 2000  # whole names and hashes, for whatever reads them
    return console


def _table(*headings: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        side: Any = "right" if heading in _NUMBERS else "left"
        table.add_column(heading, justify=side, overflow="fold")  # nothing is cut off
    return table


_NUMBERS = ("step", "epoch", "bytes", "arrays", "largest difference")


def _show_all(paths: Any) -> int:
    """One line per checkpoint of a folder; 1 if one of them is damaged."""
    table = _table("checkpoint", "step", "epoch", "bytes", "values")
    is_sound = True
    for path in paths:
        try:
            document = verify_checkpoint(path)
        except CheckpointError as error:
            is_sound = False
            table.add_row(path.name, "", "", "", f"DAMAGED: {error}")
            continue
        size = sum(facts["size"] for facts in document["files"].values())
        values = _values(document)
        epoch = str(document["epoch"])
        table.add_row(path.name, str(document["step"]), epoch, format_bytes(size), values)
    _console().print(table)
    return 0 if is_sound else 1


def _values(document: Mapping[str, Any]) -> str:
    numbers = {k: v for k, v in document["values"].items() if isinstance(v, (int, float))}
    return "  ".join(f"{key} {value:.5g}" for key, value in numbers.items())


def _show(path: Path, lists_arrays: bool) -> None:
    document = verify_checkpoint(path)
    console = _console()
    position = document["position"] or {}
    facts = _table("", "")
    where = {"begin": "at the begin of", "batches": "inside", "epoch_end": "before the end of"}
    place = where.get(position.get("phase", ""), "after")
    facts.add_row("step", str(document["step"]))
    facts.add_row("epoch", f"{place} epoch {document['epoch']} (0-based)")
    if document["batch"]:
        facts.add_row("batches", f"{document['batch']} of that epoch")
    facts.add_row("values", _values(document) or "none")
    facts.add_row("trained", f"{len(document['trainable'])} parameters")
    if document["frozen"]:
        facts.add_row("expected", f"{len(document['frozen'])} frozen parameters, by their hashes")
    facts.add_row("callbacks", ", ".join(document["callbacks"]) or "none")
    facts.add_row("arguments", ", ".join(f"{k}={v!r}" for k, v in document["arguments"].items()))
    facts.add_row("versions", ", ".join(f"{k} {v}" for k, v in document["versions"].items()))
    console.print(facts)
    files = _table("file", "bytes", "arrays", "SHA-256")
    for name, expected in document["files"].items():
        arrays = read_file(path / name, expected)
        files.add_row(name, format_bytes(expected["size"]), str(len(arrays)), expected["sha256"])
        if lists_arrays:
            for key, array in sorted(arrays.items()):
                files.add_row(f"  {key}", format_bytes(array.nbytes), "", _kind(array))
    console.print(files)
    console.print("Every hash agrees.")


def _kind(array: mx.array) -> str:
    return f"{str(array.dtype).removeprefix('mlx.core.')} {tuple(array.shape)}"


def _compare(one: Path, other: Path) -> int:
    """List what differs, by file and name."""
    first, second = _arrays(one), _arrays(other)
    table = _table("array", "largest difference", "")
    rows = []
    for name in sorted(first.keys() | second.keys()):
        difference = _difference(first.get(name), second.get(name), one.name, other.name)
        if difference is not None:
            rows.append((name, *difference))
    for row in rows[:SHOWN]:
        table.add_row(*row)
    console = _console()
    if rows:
        console.print(table)
    if len(rows) > SHOWN:
        console.print(f"... and {len(rows) - SHOWN} more")
    console.print(f"{len(first.keys() | second.keys())} arrays, {len(rows)} differ.")
    documents = read_document(one), read_document(other)
    for key in ("step", "epoch", "batch", "random_key"):
        if documents[0][key] != documents[1][key]:
            console.print(f"{key}: {documents[0][key]} and {documents[1][key]}")
    return 1 if rows else 0


def _arrays(path: Path) -> dict[str, mx.array]:
    document = read_document(path)
    found: dict[str, mx.array] = {}
    for file in FILES:
        if file in document["files"]:
            arrays = read_file(path / file, document["files"][file])
            found |= {f"{file.partition('.')[0]}: {name}": a for name, a in arrays.items()}
    return found


def _difference(
    one: mx.array | None, other: mx.array | None, first: str, second: str
) -> tuple[str, str] | None:
    if one is None or other is None:
        return "", f"only in {second if one is None else first}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return "", f"{_kind(one)} and {_kind(other)}"
    a, b = (
        np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
        for array in (one, other)
    )
    if a.tobytes() == b.tobytes():
        return None
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return f"{np.max(np.abs(a.astype(wide) - b.astype(wide))):.6g}", ""
