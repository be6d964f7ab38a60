"""Runs in Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mlx_fit.errors import ConfigurationError
from mlx_fit.loggers.base import Past, require

OURS = ("id", "resume", "reinit", "config")  # arguments of wandb.init that a logger must decide


class WandbLogger:
    """Logs to a run of Weights & Biases (``pip install wandb``).

    A resumed training goes on with the same run. What the run has beyond the checkpoint is not
    written again: the values are the same. Offline, each session has a folder of its own, which
    goes on from the checkpoint, for ``wandb sync``; of a session that was killed with ``kill -9``
    W&B has on disk what it had written by then.

    Args:
        project, name: as in ``wandb.init``.
        run: a run that is open already, which then stays open; None opens one.
        options: further arguments of ``wandb.init``, such as ``mode="offline"``, ``dir`` or
            ``tags``.

    Attributes:
        id: the run's.

    Raises:
        ConfigurationError: ``wandb`` is not installed, or an argument cannot work.

    Example:
        >>> # fit(..., callbacks=[LoggerCallback(WandbLogger("digits", mode="offline"))])
    """

    def __init__(
        self, project: str | None = None, name: str | None = None, run: Any = None, **options: Any
    ) -> None:
        require("wandb", "WandbLogger", "wandb")
        given = [key for key in OURS if key in options]
        if given:
            raise ConfigurationError(
                f"WandbLogger: {', '.join(given)} cannot be given: checkpoints keep the run's id, "
                "and fit's arguments are its config. Give run= for a run of your own."
            )
        if run is not None and (options or project is not None or name is not None):
            raise ConfigurationError(
                "WandbLogger: run= is open already; leave project, name and other arguments out."
            )
        self.id: str = uuid.uuid4().hex[:8] if run is None else run.id
        self._options = {"project": project, "name": name, **options}
        self._given = run
        self._run: Any = None
        self._past = Past("WandbLogger")
        self._last: int | None = None  # the step that the run had come to when it was opened

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Add to the run's config; what changed is replaced."""
        self._open().config.update(dict(config), allow_val_change=True)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add to the row of this step."""
        run = self._open()
        if self._past.holds(step, self._last):
            return
        run.log(dict(values), step=step)

    def close(self, error: BaseException | None = None) -> None:
        """End the run, as failed after an error; a run that was given stays open."""
        if self._run is not None and self._given is None:
            self._run.finish(exit_code=0 if error is None else 1)
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run of this id, unless one was given that is open."""
        self._past.is_resumed = True
        if self._given is None and state["id"] != self.id:
            self.close()
            self.id = state["id"]

    def _open(self) -> Any:
        if self._run is None:
            self._run = self._given or self._start()
            begins_at = self._run.starting_step  # 0 for a new run, and offline
            self._last = begins_at - 1 if begins_at else None
        return self._run

    def _start(self) -> Any:
        wandb = import_module("wandb")  # here: it is optional
        return wandb.init(id=self.id, resume="allow", reinit="create_new", **self._options)
