"""Read what a run left behind: checkpoints with their curves, or log files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from mlx_fit.checkpoint.codec import decode
from mlx_fit.checkpoint.format import STATE, read_document
from mlx_fit.errors import CheckpointCorruptError, CheckpointError, DataError
from mlx_fit.history import History

Points = list[tuple[float, float]]  # place on the axis, value; NaN is a gap
HEAD = ("event", "epoch", "step")


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run.

    Attributes:
        name: its folder's.
        step, epoch, num_bytes: what its ``state.json`` says; None if that is damaged.
        values: the numbers that were saved with it.
        damage: what is wrong with it, or empty.
    """

    name: str
    step: int | None = None
    epoch: int | None = None
    num_bytes: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    damage: str = ""


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        path: where it was read.
        name: what the page calls it.
        by_epoch, by_step: key -> curve, over epochs counted from 1 and over steps.
        num_epochs, step: how far it came; None if unknown.
        stopped_by: why it ended early, if it did.
        arguments, versions: of ``fit`` and of the software.
        checkpoints: oldest first.
    """

    path: Path
    name: str = ""
    by_epoch: dict[str, Points] = field(default_factory=dict)
    by_step: dict[str, Points] = field(default_factory=dict)
    num_epochs: int | None = None
    step: int | None = None
    stopped_by: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Saved] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """The run in a checkpoint, a folder of checkpoints, or a log of CSVLogger or JSONLogger.

    Raises:
        CheckpointError: a folder holds no readable checkpoint.
        DataError: a file is no such log.
        OSError: it cannot be read.
    """
    return _read_checkpoints(path) if path.is_dir() else _read_log(path)


def name_runs(runs: list[Run]) -> None:
    """Name each by the last parts of its path that tell it from the others."""
    parts = [run.path.absolute().parts for run in runs]
    for index, run in enumerate(runs):
        length = 1
        while length < len(parts[index]) and any(
            other[-length:] == parts[index][-length:]
            for other in parts[:index] + parts[index + 1 :]
            if other != parts[index]
        ):
            length += 1
        run.name = str(Path(*parts[index][-length:]))
        if again := parts[:index].count(parts[index]):
            run.name += f" ({again + 1})"


# --- checkpoints ----------------------------------------------------------------------------------


def _read_checkpoints(folder: Path) -> Run:
    single = (folder / STATE).exists()
    places = [folder] if single else [p for p in folder.iterdir() if _is_checkpoint(p)]
    saved, documents, damage = [], [], ""
    for place in sorted(places):
        try:
            document = read_document(place)
        except CheckpointError as error:
            damage = str(error)
            saved.append(Saved(place.name, damage=damage))
            continue
        documents.append(document)
        saved.append(_saved(place, document))
    if not documents:
        reason = damage or (
            f"{folder} holds no checkpoint; expected a checkpoint, a folder of them, or the file "
            "of a CSVLogger or JSONLogger."
        )
        raise CheckpointError(reason, path=folder)
    newest = max(documents, key=lambda document: document["step"])
    saved.sort(key=lambda one: (one.step is None, one.step or 0))
    run = Run(folder, step=newest["step"], checkpoints=saved, versions=dict(newest["versions"]))
    try:
        _take_over(run, newest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a hash proves no good will
        raise CheckpointCorruptError(
            f"{folder} is damaged: its history cannot be read ({error!r}).", path=folder
        ) from error
    return run


def _take_over(run: Run, document: Mapping[str, Any]) -> None:
    """Fill in arguments and curves from a ``state.json``."""
    run.arguments = decode(document["arguments"], {})
    if document["history"] is None:
        return
    history = History({}, lambda key: None)
    history.load_state_dict(decode(document["history"], {}))
    run.stopped_by, run.num_epochs = history.stopped_by, len(history.rows)
    run.by_epoch = _curves((row["epoch"] + 1, row) for row in history.rows)
    events = [*history.steps, *history.evaluations]
    run.by_step = _curves((row["step"], row) for row in events)


def _is_checkpoint(path: Path) -> bool:
    return not path.name.startswith(".") and (path / STATE).is_file()


def _saved(place: Path, document: Mapping[str, Any]) -> Saved:
    size = sum(facts["size"] for facts in document["files"].values())
    size += (place / STATE).stat().st_size
    values = {k: float(v) for k, v in document["values"].items() if _is_number(v)}
    return Saved(place.name, document["step"], document["epoch"], size, values)


# --- log files ------------------------------------------------------------------------------------


def _read_log(path: Path) -> Run:
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    is_json = text.lstrip().startswith("{")
    rows = _json_rows(path, text) if is_json else _csv_rows(path, text)
    epochs = [row for row in rows if row.get("event", "epoch") == "epoch"]
    run = Run(path, num_epochs=len(epochs))
    run.by_epoch = _curves((row["epoch"] + 1, row) for row in epochs)
    with_step = [row for row in rows if _is_place(row.get("step"))]
    run.by_step = _curves((row["step"], row) for row in with_step)
    run.step = int(max((row["step"] for row in with_step), default=0)) or None
    return run


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # half a line: the run is still writing
            raise DataError(f"this is no JSON: {error}", path=path, line=number) from error
        if not isinstance(row, dict) or not _is_place(row.get("epoch")):
            raise DataError(
                "expected an object with a number 'epoch', as JSONLogger writes them.",
                path=path,
                line=number,
            )
        rows.append(row)
    return rows


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    lines = text.splitlines()
    heading = lines[0] if lines else ""
    separator = max(",;\t|", key=heading.count)
    reader = csv.DictReader(lines, delimiter=separator)
    if "epoch" not in (reader.fieldnames or []):
        raise DataError(
            f"no column 'epoch' in the first line {heading[:80]!r}; expected a file of CSVLogger, "
            "JSONLogger or History.to_csv.",
            path=path,
        )
    rows = []
    for cells in reader:
        row = {key: _float(cell) for key, cell in cells.items() if isinstance(key, str)}
        if row["epoch"] is None or not math.isfinite(row["epoch"]):
            raise DataError(
                f"the epoch is {cells['epoch']!r}; expected a number.",
                path=path,
                line=reader.line_num,
            )
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def _float(cell: Any) -> float | None:
    """A cell's number; None if it is empty or holds something else."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# --- curves ---------------------------------------------------------------------------------------


def _curves(rows: Iterable[tuple[float, Mapping[str, Any]]]) -> dict[str, Points]:
    """Numbers by key; null, which stands for NaN in JSON, is a gap."""
    curves: dict[str, Points] = {}
    for place, row in sorted(rows, key=lambda pair: pair[0]):
        for key, value in row.items():
            if key not in HEAD and (_is_number(value) or value is None):
                value = math.nan if value is None else float(value)
                curves.setdefault(key, []).append((float(place), value))
    return {k: _last_of_each(p) for k, p in curves.items() if any(v == v for _, v in p)}


def _last_of_each(points: Points) -> Points:
    return list(dict(points).items())


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_place(value: Any) -> bool:
    """Whether a curve can have a point there: Python reads NaN in JSON."""
    return _is_number(value) and math.isfinite(value)
