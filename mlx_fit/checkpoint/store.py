"""A folder of checkpoints: the newest is found by reading, and at no moment there is none.

Imports layer 2: checkpoint.arrays, checkpoint.format, checkpoint.policy.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

from mlx_fit.checkpoint.arrays import NonFiniteArrays
from mlx_fit.checkpoint.format import (
    FILES,
    STATE,
    Snapshot,
    read_checkpoint,
    read_document,
    write_checkpoint,
)
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.checks import path_of
from mlx_fit.errors import CheckpointError, CheckpointWriteError, NonFiniteLossError
from mlx_fit.state import TrainState, sync_folder

_NAME = re.compile(r"step-(\d{8,})")
_STAGED = re.compile(r"\.tmp-step-\d{8,}-[0-9a-f]{16}")
_ASIDE = re.compile(r"\.old-(step-\d{8,})-[0-9a-f]{16}")
_DISCARDED = f".discarded-{STATE}"  # a manifest whose files are being deleted


class CheckpointStore:
    """Checkpoints ``step-00001200`` in a folder.

    Args:
        directory: the folder; made at the first save.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = path_of("directory", directory)

    def steps(self) -> dict[int, Path]:
        """Folders with a checkpoint's name, whole or not, by step, in order."""
        found = {}
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                match = _NAME.fullmatch(path.name)
                if match and path.is_dir() and any((path / name).exists() for name in _PARTS):
                    found[int(match[1])] = path
        return dict(sorted(found.items()))

    def recover(self) -> None:
        """Clear up after a run that was killed: unfinished folders go, one moved aside returns."""
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            aside = _ASIDE.fullmatch(path.name)
            if aside and not (self.directory / aside[1]).exists():
                path.rename(self.directory / aside[1])
                sync_folder(self.directory)
            elif aside or _STAGED.fullmatch(path.name):
                _remove_files(path, [*FILES, STATE])
            elif _NAME.fullmatch(path.name) and (path / _DISCARDED).is_file():
                _remove_files(path, [*FILES, _DISCARDED])

    # --- reading ----------------------------------------------------------------------------------

    def newest(self) -> tuple[Path, TrainState] | None:
        """The newest whole checkpoint. Newer ones that are damaged are named in one warning."""
        damaged: list[str] = []
        found = None
        for path in reversed(self.steps().values()):
            try:
                if path.is_symlink():
                    raise CheckpointError("it is a symbolic link")
                found = path, read_checkpoint(path)
                break
            except CheckpointError as error:
                damaged.append(f"{path.name} ({error})")
        if damaged:
            used = f"{found[0].name} is used" if found else "there is no other"
            warnings.warn(
                f"Skipped in {self.directory}, because not whole: {'; '.join(damaged)}. {used}.",
                stacklevel=4,
            )
        return found

    # --- writing ----------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, hashes: dict[str, str]) -> Path:
        """Write a checkpoint, whole or not at all, in the place of one of the same step.

        Raises:
            CheckpointWriteError: it could not be written; earlier ones are untouched.
            NonFiniteLossError: weights or optimizer state hold NaN or infinity.
        """
        step = snapshot.document["step"]
        place = self.directory / f"step-{step:08d}"
        write_folder(place, snapshot, hashes)
        return place

    def prune(self, policy: CheckpointPolicy, is_higher_better: bool | None, newest: int) -> None:
        """Delete what the policy does not keep. What cannot be deleted is named in a warning.

        Args:
            policy: what to keep.
            is_higher_better: the direction of its monitor, None if there is none.
            newest: the step written last. Later ones are damaged or those of a run that was given
                up: they stay, and nothing is deleted in their favour.
        """
        if policy.keep_last is None:
            return
        steps = {step: path for step, path in self.steps().items() if step <= newest}
        kept = {*list(steps)[-policy.keep_last :]}
        if policy.keep_best and is_higher_better is not None:
            kept |= self._best(steps, policy, is_higher_better)
        for step in steps.keys() - kept:
            try:
                remove_checkpoint(steps[step])
            except CheckpointError:
                continue  # without a manifest nobody knows which files are ours
            except OSError as error:
                warnings.warn(
                    f"The old checkpoint {steps[step]} could not be deleted: {error}", stacklevel=2
                )

    def _best(
        self, steps: dict[int, Path], policy: CheckpointPolicy, is_higher_better: bool
    ) -> set[int]:
        values: list[tuple[float, int]] = []
        for step, path in steps.items():
            try:
                value = read_document(path)["values"].get(policy.monitor)
            except CheckpointError:
                continue
            if isinstance(value, (int, float)) and not math.isnan(value):
                values.append((-value if is_higher_better else value, step))
        return {step for _, step in sorted(values)[: policy.keep_best]}


_PARTS = (*FILES, STATE)


def write_folder(place: Path, snapshot: Snapshot, hashes: dict[str, str]) -> None:
    """Write a checkpoint to ``place``: staged beside it under another name, then renamed.

    Raises:
        CheckpointWriteError: it could not be written; what was there is untouched.
        NonFiniteLossError: weights or optimizer state hold NaN or infinity.
    """
    import shutil  # slow to import: it loads every compression

    label = f"{place.name}-{os.urandom(8).hex()}"
    staged = place.with_name(f".tmp-{label}")
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(staged, snapshot, hashes)
            _put(staged, place, place.with_name(f".old-{label}"))
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)  # only we know its name
            raise
    except NonFiniteArrays as error:
        step, names = snapshot.document["step"], ", ".join(error.names[:5])
        raise NonFiniteLossError(
            f"Not saved to {place}: after step {step} these arrays hold NaN or infinity: {names}"
            f"{', ...' if len(error.names) > 5 else ''}. Go on from a checkpoint saved before.",
            step=step,
            epoch=snapshot.document["epoch"],
            value=math.nan,
        ) from None
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointWriteError(
            f"{place} could not be written: {error}. Earlier checkpoints are whole.", path=place
        ) from error


def _put(staged: Path, place: Path, aside: Path) -> None:
    """Rename a complete folder to its place, past one that is there already."""
    if place.is_symlink() or (place.exists() and not is_checkpoint(place)):
        raise CheckpointWriteError(
            f"{place} exists and is no checkpoint; give another path, or move it away.", path=place
        )
    if place.exists():
        place.rename(aside)
        staged.rename(place)
        sync_folder(place.parent)
        _keep_strangers(aside, place)
        _remove_files(aside, _PARTS)
    else:
        staged.rename(place)
        sync_folder(place.parent)


def bring_back(path: Path) -> None:
    """Undo a replacement of ``path`` that was cut short between its two renames."""
    pattern = re.compile(rf"\.old-{re.escape(path.name)}-[0-9a-f]{{16}}")
    if not path.exists() and path.parent.is_dir():
        for entry in path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                entry.rename(path)
                return


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is empty or holds parts of a checkpoint, so that one may be put there."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [""]
    return not names or any(name in _PARTS for name in names)


def _keep_strangers(aside: Path, place: Path) -> None:
    """A user's file in a replaced checkpoint moves to the new one."""
    for entry in aside.iterdir():
        if entry.name not in _PARTS:
            entry.rename(place / entry.name)


def remove_checkpoint(path: Path) -> None:
    """Delete the files that a checkpoint's manifest names, and the folder if nothing is left.

    Raises:
        OSError: a file could not be deleted.
        CheckpointError: there is no manifest.
    """
    files = read_document(path)["files"]
    # From here on it is no checkpoint, but what is left of one: see CheckpointStore.recover.
    (path / STATE).rename(path / _DISCARDED)
    _remove_files(path, [*files, _DISCARDED])


def _remove_files(folder: Path, names: Any) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file may be in it
        folder.rmdir()
