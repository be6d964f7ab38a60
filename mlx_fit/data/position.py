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


def check_state(state: Any, current: dict[str, Any], draws_seed: bool) -> None:
    """Refuse a saved state that is of another set-up than ``current``.

    Args:
        state: what a user gave.
        current: the state of the loader that shall take it.
        draws_seed: the loader has no seed of its own, and takes the saved one.

    Raises:
        ResumeError: it differs; the message names the field.
    """
    if not isinstance(state, dict) or state.keys() != current.keys():
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ResumeError(f"Not a DataLoader state: expected {sorted(current)}, found {found}.")
    free = {"epoch", "samples_consumed", "dataset_state"} | ({"seed"} if draws_seed else set())
    for field in current:
        if field not in free and state[field] != current[field]:
            raise ResumeError(
                f"The state was saved with {field}={state[field]!r}, but this DataLoader has "
                f"{field}={current[field]!r}: the remaining batches would not be those that "
                "were left. Use the same data and arguments."
            )
