"""What of a trainer is saved and loaded: weights alone, or everything."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import RandomState, named_arrays, named_buffers
from mlx_fit.arguments import check_state_dict, folder_path, weights_path
from mlx_fit.checkpoint.format import take_snapshot
from mlx_fit.checkpoint.loading import check_state, put_state
from mlx_fit.checkpoint.store import write_folder
from mlx_fit.communicator import ALONE, first_alone, on_first, together
from mlx_fit.fit import Fit
from mlx_fit.history import History
from mlx_fit.pace import Pace
from mlx_fit.protocols import Averages, Communicator, Run
from mlx_fit.rates import optimizers_of
from mlx_fit.resuming import read_path, trusting
from mlx_fit.splitting import Splitters
from mlx_fit.state import (
    TrainState,
    check_buffers,
    load_optimizer,
    load_parameters,
    optimizer_arrays,
    put_buffers,
    read_arrays,
    save_weights,
    without_arrays,
)
from mlx_fit.step import TrainStep
from mlx_fit.trainable import trainable_names


class Stateful(ABC):
    """The part of a trainer that outlives its process.

    Args:
        model: the model.
        optimizer: its optimizer, or None.
        seed: as given by the user; None draws one for the order of data.

    Attributes:
        model, optimizer: what is trained, and by what.
        epoch: the newest epoch, 0-based.
        history: of the newest fit, None before the first.
        averages: the callback that averages the weights of this fit, or None.
        communicator: the ranks that train together; one, for a plain trainer.
        pace: the clock of the epoch's training.
    """

    def __init__(self, model: nn.Module, optimizer: Any, seed: int | None) -> None:
        self.model = model
        self.optimizer: Any = optimizer
        self.epoch = 0
        self.history: History | None = None
        self.averages: Averages | None = None
        self.communicator: Communicator = ALONE
        self.pace = Pace()
        self._seed = seed
        self._order_seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
        self._is_seeded = False
        self._num_passes = 0
        self._steps_before = 0
        self._scaling: dict[str, mx.array] = {}
        self._arguments: dict[str, Any] = {}
        self._train_step: TrainStep | None = None
        self._fit: Fit | None = None  # while one runs
        # With on_oom="split": that of training, whose size is saved, and that of evaluation.
        self._splitters = Splitters(False)
        self._last_fit: TrainState | None = None  # its end, without weights and optimizer state

    @abstractmethod
    def direction(self, key: str) -> bool | None:
        """Whether a higher value of a logged key is better; None where nobody declared it."""

    def save(self, path: str | Path) -> None:
        """Write everything that training goes on from to a folder, whole or not at all.

        It is a checkpoint like those of ``fit(checkpoint_dir=...)``: weights, optimizer state,
        random key, callbacks and history, for :meth:`load` and ``fit(resume=path)``.

        Raises:
            NonFiniteLossError: weights or optimizer state hold NaN or infinity; nothing is written.
            CheckpointWriteError: writing failed, or ``path`` is something else; what was there is
                untouched.
        """
        if self._fit is not None:
            state = self._fit.state()
        else:
            if self.optimizer is not None:  # before its first update it has no state to save
                self.optimizer.init(self.model.trainable_parameters())
            last = self._last_fit or TrainState({}, arguments=self._arguments)
            names = trainable_names(self.model)
            state = replace(last, trainer=self.state_dict(), trainable=names)
        folder = folder_path(path)
        with self._telling_of_a_save():
            on_first(self.communicator, lambda: write_folder(folder, take_snapshot(state), {}))

    def _telling_of_a_save(self) -> AbstractContextManager[None]:
        return nullcontext() if self._fit is None else self._fit.telling_of_a_save()

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` or ``fit(checkpoint_dir=...)`` wrote: all of it, or nothing.

        Args:
            path: a checkpoint, or a folder of them, whose newest whole one is read.

        Raises:
            CheckpointMismatchError: lists the names that do not fit the model or the optimizer.
            CheckpointError: the checkpoint is missing or damaged.
        """
        folder = folder_path(path)
        found, state = first_alone(self.communicator, lambda: read_path(folder))
        check_state(self.model, self.optimizer, state.trainer, state.trainable, str(found))
        put_state(self.model, self.optimizer, self._scaling, state.trainer)
        self._take_counters(state.trainer)
        self._last_fit = without_arrays(state)
        if state.history is not None:
            self.history = History({}, self.direction)
            with trusting(found):
                self.history.load_state_dict(state.history)

    def save_weights(self, path: str | Path) -> None:
        """Write all parameters to a ``.safetensors`` file, atomically.

        While ``fit`` runs with :class:`~mlx_fit.EMA` or :class:`~mlx_fit.SWA`, their averages.

        Raises:
            ConfigurationError: the path has another suffix.
            NonFiniteLossError: weights or optimizer state hold NaN or infinity; nothing is written.
            CheckpointWriteError: writing failed; an earlier file is untouched.
        """
        path = weights_path(path)
        with self._telling_of_a_save():
            on_first(self.communicator, lambda: save_weights(path, cast("Run", self)))

    def load_weights(self, path: str | Path, strict: bool = True) -> None:
        """Read parameters from a ``.safetensors`` file: all, or none if something does not fit.

        Args:
            path: the file.
            strict: whether missing and extra names are errors.

        Raises:
            CheckpointMismatchError: lists the names that do not fit.
            CheckpointError: the file is missing or unreadable.
        """
        path = weights_path(path)
        arrays = together(self.communicator, lambda: read_arrays(path))
        load_parameters(self.model, arrays, strict=strict, source=str(path))

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: weights, optimizer, random key and counters."""
        return {
            "model": dict(named_arrays(self.model.parameters())),
            "buffers": named_buffers(self.model),
            "optimizer": optimizer_arrays(self.optimizer),
            "loss_scale": dict(self._scaling),
            "random_key": RandomState().words,
            "step": self.step,
            "epoch": self.epoch,
            "order_seed": self._order_seed,
            "num_passes": self._num_passes,
            "micro_batch_size": self._splitters.rows,
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Go on from what :meth:`state_dict` gave; nothing is loaded if the weights do not fit.

        Args:
            state: from :meth:`state_dict`, of this or another trainer.
            strict: whether missing and extra parameter names are errors.
        """
        check_state_dict(state)
        load_parameters(self.model, state["model"], strict=strict, source="The state")
        check_buffers(self.model, state["buffers"], "The state")
        put_buffers(self.model, state["buffers"])
        if self.optimizer is not None and state["optimizer"]:
            self.optimizer.init(self.model.trainable_parameters())
            load_optimizer(self.optimizer, state["optimizer"])
        self._scaling = dict(state["loss_scale"])
        RandomState(state["random_key"]).restore()
        self._take_counters(state)

    @property
    def step(self) -> int:
        """Windows of batches taken so far, over all fits."""
        active = self._train_step.num_windows if self._train_step else 0
        return self._steps_before + active

    @property
    def num_batches(self) -> int:
        """Batches taken so far in this epoch."""
        return self._train_step.num_batches if self._train_step else 0

    @property
    def learning_rate(self) -> float | None:
        """The rate of the newest update. Reads the device."""
        rate = optimizers_of(self.optimizer)[0].state.get("learning_rate")
        return None if rate is None else float(rate.item())

    def _take_counters(self, state: Mapping[str, Any]) -> None:
        self._is_seeded = True
        self._train_step = None
        self._steps_before = state["step"]
        self.epoch = state["epoch"]
        self._order_seed = state["order_seed"]
        self._num_passes = state["num_passes"]
        if self._splitters.training is not None:
            self._splitters.training.rows = state.get("micro_batch_size")

    def _drop_train_step(self) -> None:
        self._steps_before, self._train_step = self.step, None
