"""What layers know of each other: a callback sees a run through :class:`Run`, not a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_fit.pace import Pace


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Attributes:
        kind: ``"fit"``, ``"evaluate"`` or ``"predict"``.
        epochs, initial_epoch: as given to ``fit``.
        steps_per_epoch: training batches of an epoch, None while unknown.
        validation_sets: names of the validation sets; ``("",)`` for a single one, ``()`` for none.
        validates_inside_epochs: whether validation runs every so many steps.
        batch_size: rows of a global batch.
        rows_per_step: rows of an update: the batches of its window together.
        verbose: 0, 1 or 2.
        arguments: the trainer's and the run's arguments, as plain values, for records.
        compiles: whether the step is compiled.
    """

    kind: str = "fit"
    epochs: int = 1
    initial_epoch: int = 0
    steps_per_epoch: int | None = None
    validation_sets: tuple[str, ...] = ()
    validates_inside_epochs: bool = False
    batch_size: int = 0
    rows_per_step: int = 0
    verbose: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = True

    @property
    def has_validation(self) -> bool:
        """Whether validation data was given."""
        return bool(self.validation_sets)


class Communicator(Protocol):
    """The ranks of a run: processes that train one model together.

    Attributes:
        rank: of this process, from 0. Rank 0 writes files, and its order, seed and weights count.
        size: how many there are.
        uneven: ``"join"``: ranks whose own data has ended take part without samples until all have
            ended. ``"stop"``: all end with the first.
        balances: whether faster ranks are to read more of a batch.
        rates: rows a second of each rank, in any unit; None: all are alike.
    """

    rank: int
    size: int
    uneven: str
    balances: bool
    rates: tuple[float, ...] | None

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, by rank. All of them call it at the same place."""

    def sum(self, arrays: list[mx.array]) -> list[mx.array]:
        """Elementwise sums over the ranks of arrays of equal shapes and dtypes, evaluated.

        The list may be emptied: what nobody else holds can be summed in place.
        """

    def at_step(self, step: int) -> None:
        """Which step the collectives that follow belong to, for messages."""

    def knows(self, error: BaseException) -> None:
        """All ranks raise this error, so nobody needs to be told of it."""

    def report(self, error: BaseException) -> None:
        """Tell the other ranks why this one leaves."""


class Averages(Protocol):
    """Averages of the weights, which stand in for them in evaluation and in weight files."""

    def averages(self) -> dict[str, mx.array]:
        """The averaged parameters by name, in their own dtype; empty while there are none."""

    def standing_in(self) -> AbstractContextManager[None]:
        """The averages in the model inside, the raw weights again outside."""


class Run(Protocol):
    """The run that a callback watches.

    Attributes:
        averages: the callback that averages the weights of this fit, or None.
        communicator: the ranks that train together; one, for a plain trainer.
        pace: the clock of the epoch's training.
    """

    averages: Averages | None
    communicator: Communicator
    pace: Pace
    model: nn.Module
    optimizer: Any
    epoch: int
    stop_training: bool
    stop_predicting: bool
    quiet_on_nonfinite: bool
    info: RunInfo

    @property
    def step(self) -> int:
        """Windows of batches taken so far, over all fits."""

    @property
    def num_batches(self) -> int:
        """Batches taken so far in this epoch."""

    @property
    def history(self) -> Any:
        """The history of the run so far."""

    @property
    def learning_rate(self) -> float | None:
        """The rate of the newest update. Reads the device."""

    def direction(self, key: str) -> bool | None:
        """Whether a higher value of a logged key is better; None where nobody declared it."""

    def stop_on_nonfinite(self) -> None:
        """End training quietly, instead of raising, when the loss becomes non-finite."""

    def request_stop(self, reason: str) -> None:
        """End training after the current batch's update."""

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state, random key and counters."""

    def save(self, path: str | Path) -> None:
        """Write everything that the run goes on from to a checkpoint folder."""

    def predict_on_batch(self, x: Any) -> Any:
        """The model's outputs for one batch, as NumPy arrays."""

    def save_weights(self, path: str | Path) -> None:
        """Write the weights, or their averages, to a ``.safetensors`` file."""
