"""Going on from a checkpoint: which one, whether it fits, and what is different now."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.checkpoint.format import STATE, read_checkpoint, versions
from mlx_fit.checkpoint.loading import check_state, put_state
from mlx_fit.checkpoint.store import CheckpointStore, bring_back
from mlx_fit.data.feed import Feed
from mlx_fit.errors import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigurationError,
    MlxFitError,
    ResumeError,
)
from mlx_fit.rates import OptimizerSetup, set_rates
from mlx_fit.state import TrainState
from mlx_fit.trainable import trainable_names

# They say how long a run is, not what it is: to change them is why one resumes.
UNREPORTED = ("epochs", "max_steps")
FIXED = ("initial_epoch",)


@dataclass
class Resumption:
    """A run that goes on.

    Attributes:
        path: the checkpoint.
        state: what it holds.
        differences: what is not as it was, in words.
        restore: puts its weights, optimizer state and random key in place.
        is_rebatched: whether batches have another size now.
        is_taken_up: whether the fit has gone to where it was.
    """

    path: Path
    state: TrainState
    differences: list[str]
    restore: Callable[[], None]
    is_rebatched: bool = False
    is_taken_up: bool = False

    @property
    def position(self) -> dict[str, Any]:
        """Where in the fit it was taken."""
        assert self.state.position is not None
        return self.state.position

    @property
    def num_windows(self) -> int:
        """Steps that the fit had taken."""
        return int(self.state.trainer["step"]) - int(self.position["first_step"])

    def report(self, changes: list[str]) -> None:
        """Say once, in one warning, what is not as it was."""
        if differences := self.differences + changes:
            warnings.warn(
                f"The run goes on from {self.path} with changes: {'; '.join(differences)}.",
                stacklevel=2,
            )


def open_store(
    checkpoint_dir: Any, checkpoint_every: Any, resume: Any
) -> tuple[CheckpointStore | None, tuple[Path, TrainState] | None]:
    """Where ``fit`` saves, and what it goes on from.

    Raises:
        ConfigurationError: arguments that do not go together.
        ResumeError: there is nothing to resume, or something that would be overwritten.
        CheckpointError: the checkpoint asked for cannot be read.
    """
    if not isinstance(resume, (bool, str, os.PathLike)):
        raise ConfigurationError(
            f'resume={resume!r}; expected False, True, "auto" or the path of a checkpoint.'
        )
    store = None
    if checkpoint_dir is not None:
        if not isinstance(checkpoint_dir, (str, os.PathLike)) or not os.fspath(checkpoint_dir):
            raise ConfigurationError(f"checkpoint_dir={checkpoint_dir!r}; expected a folder.")
        store = CheckpointStore(Path(checkpoint_dir))
        store.recover()
    elif resume is True or resume == "auto":
        raise ConfigurationError(f"resume={resume!r} needs checkpoint_dir, the folder to look in.")
    elif checkpoint_every != "epoch":
        raise ConfigurationError(
            f"checkpoint_every={checkpoint_every!r} does nothing without checkpoint_dir."
        )
    if resume is True or resume == "auto":
        assert store is not None
        found = store.newest()
        if found is None and resume is True:
            raise ResumeError(
                f"resume=True, but {store.directory} holds no whole checkpoint. Use resume='auto' "
                "to start where there is none."
            )
        return store, found
    path = None if resume is False else Path(resume)
    if store is not None and (held := list(store.steps().values())):
        own = [entry.resolve() for entry in [*held, store.directory]]
        if path is None or path.resolve() not in own:
            raise ResumeError(
                f"{store.directory} holds checkpoints already, the newest is {held[-1].name}. "
                "Pass resume='auto' to go on from it, or give another checkpoint_dir."
            )
        if newer := held[own.index(path.resolve()) + 1 :]:
            warnings.warn(
                f"{store.directory} holds {', '.join(e.name for e in newer)}, newer than {path}: "
                "resume='auto' will take the newest of them until this run writes a later one. "
                "Move them away to go on from here for good.",
                stacklevel=4,
            )
    return store, None if path is None else read_path(path)


def read_path(path: Path) -> tuple[Path, TrainState]:
    """A checkpoint, or the newest in a folder of them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    bring_back(path)
    if path.is_dir() and not (path / STATE).exists():
        store = CheckpointStore(path)
        store.recover()
        if found := store.newest():
            return found
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: there is no such folder.", path=path)
    return path, read_checkpoint(path)


@contextmanager
def trusting(path: Path) -> Iterator[None]:
    """Say that a checkpoint is no sound one where its contents make no sense.

    Its hashes agree, so either another version wrote it or somebody with other intentions.
    """
    try:
        yield
    except MlxFitError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointCorruptError(
            f"{path} is whole, but what it says makes no sense: {error!r}. It was not written by "
            "this version of mlx_fit.",
            path=path,
            expected="the state of a fit",
            got=repr(error),
        ) from error


def differences(saved: TrainState, arguments: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the checkpoint was written.

    Raises:
        ResumeError: something that cannot change.
    """
    before = saved.arguments | {k: v for k, v in saved.versions.items() if k in BITS}
    now = dict(arguments) | {k: v for k, v in versions().items() if k in BITS}
    found = []
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if old == new or name in UNREPORTED:
            continue
        if name in FIXED:
            raise ResumeError(
                f"The checkpoint was made with {name}={old!r}, and now {name}={new!r}, which "
                "cannot change: a resumed run goes on where it was."
            )
        found.append(f"{name} was {old!r}, is now {new!r}")
    return found


BITS = ("mlx_fit", "mlx", "numpy", "device")


def prepare(
    path: Path,
    state: TrainState,
    *,
    model: nn.Module,
    setup: OptimizerSetup,
    scaling: dict[str, mx.array],
    feed: Feed,
    arguments: Mapping[str, Any],
) -> Resumption | None:
    """Check everything, then put weights and optimizer state in place and the data to its place.

    Returns:
        None if it was saved before any fit: there is nothing to go on with but the weights.

    Raises:
        CheckpointMismatchError: the model or the optimizer is another.
        ResumeError: the data, or an argument that cannot change, is.
    """
    optimizer, trainer = setup.optimizer, state.trainer
    check_state(model, optimizer, trainer, state.trainable, str(path))
    if state.position is None:
        put_state(model, optimizer, scaling, trainer)
        return None
    found = differences(state, arguments)
    with trusting(path):
        feed.load_state_dict(state.position["feed"])
    changed = {text.partition(" ")[0] for text in found}
    is_same = set(state.trainable) == set(trainable_names(model))
    put_state(model, optimizer, scaling, trainer, with_optimizer=is_same)

    def restore() -> None:
        put_state(model, optimizer, scaling, trainer)
        if any(name.endswith(".learning_rate") for name in changed):
            set_rates(optimizer, setup.rates)

    return Resumption(path, state, found, restore, "batch_size" in changed)


def check_seed(seed: int | None, saved: int) -> None:
    """Raise if another seed than the checkpoint's is asked for: the order would be another."""
    if seed is not None and seed != saved:
        raise ResumeError(
            f"The checkpoint was made with seed={saved}, and this trainer has seed={seed}: the "
            "order of data would be another. Use the same seed, or None, which takes it over."
        )
