"""Where a loader is in its data, and the saved form of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_fit.errors import ResumeError

__all__ = ["Place", "Position", "check_state"]


@dataclass
class Position:
    """How far one pass over the data has come: what was handed out, not what was read ahead.

    Attributes:
        epoch: of the pass, counted from 0.
        samples_consumed: rows handed out.
        dataset_state: of an iterable dataset with a ``state_dict``, after these rows.
    """

    epoch: int
    samples_consumed: int
    dataset_state: Any = None


@dataclass
class Place:
    """Where a loader is, and with it its shares for several ranks.

    Attributes:
        position: of the newest pass.
        is_loaded: the position is where to start, not where an iterator has come.
        is_spent: the dataset is an iterator, and was read.
    """

    position: Position
    is_loaded: bool = False
    is_spent: bool = False


def check_state(
    state: Any,
    current: dict[str, Any],
    draws_seed: bool,
    *,
    kind: str = "DataLoader",
    consumed: str = "samples_consumed",
) -> None:
    """Refuse a saved state that is of another set-up than ``current``.

    Args:
        state: what a user gave.
        current: the state of the loader that shall take it.
        draws_seed: the loader has no seed of its own, and takes the saved one.
        kind: the class of the loader, for messages.
        consumed: the field that counts what was handed out of the epoch.

    Raises:
        ResumeError: it differs; the message names the field.
    """
    if not isinstance(state, dict) or state.keys() != current.keys():
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ResumeError(f"Not a {kind} state: expected {sorted(current)}, found {found}.")
    free = {"epoch", consumed, "dataset_state"} | ({"seed"} if draws_seed else set())
    for field in current:
        if field not in free and state[field] != current[field]:
            raise ResumeError(
                f"The state was saved with {field}={state[field]!r}, but this {kind} has "
                f"{field}={current[field]!r}: the remaining batches would not be those that "
                "were left. Use the same data and arguments."
            )
    for field in ("seed", "epoch", consumed):
        if type(state[field]) is not int or state[field] < 0:
            raise ResumeError(f"{field}={state[field]!r} in a {kind} state is no position.")
