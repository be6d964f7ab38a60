"""Runs in MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mlx_fit.loggers.base import Past, flat, require

MOST_PARAMS = 100  # of one request, and the length of a value, as MLflow limits them
LONGEST = 6000


class MLflowLogger:
    """Logs to a run of MLflow (``pip install mlflow`` or ``mlflow-skinny``).

    A resumed training goes on with the same run. What the run has beyond the checkpoint is not
    written again: the values are the same. MLflow lets no parameter change, so those of a resumed
    training that differ become the tag ``resumed.<name>``.

    Args:
        experiment: its name; it is made if there is none.
        run_name: the run's; None lets MLflow choose.
        tracking_uri: where to, such as ``"sqlite:///mlflow.db"`` or a server's address; None
            takes MLflow's own setting (``MLFLOW_TRACKING_URI``).
        run_id: a run to go on with; None makes one.
        tags: of the run.

    Attributes:
        run_id: the run's, None before it is made.

    Raises:
        ConfigurationError: ``mlflow`` is not installed.

    Example:
        >>> # fit(..., callbacks=[LoggerCallback(MLflowLogger("digits"))])
    """

    def __init__(
        self,
        experiment: str = "Default",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        require("mlflow", "MLflowLogger", "mlflow")
        self.run_id = run_id
        self._experiment = experiment
        self._run_name = run_name
        self._tracking_uri = tracking_uri
        self._tags = dict(tags or {})
        self._client: Any = None
        self._is_taken_up = run_id is not None
        self._last: dict[str, int | None] = {}  # key -> step that the run had when it was opened
        self._past = Past("MLflowLogger")

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Add parameters, by dotted names."""
        entities = import_module("mlflow.entities")
        client, run_id = self._open()
        known = client.get_run(run_id).data.params
        texts = {key: str(value)[:LONGEST] for key, value in flat(config)}
        params = [entities.Param(key, text) for key, text in texts.items() if key not in known]
        for start in range(0, len(params), MOST_PARAMS):
            client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
        changed = {key: text for key, text in texts.items() if known.get(key, text) != text}
        if changed:
            tags = [entities.RunTag(f"resumed.{key}", text) for key, text in changed.items()]
            client.log_batch(run_id, tags=tags)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add metrics, all with one time."""
        entities = import_module("mlflow.entities")
        client, run_id = self._open()
        now = int(1e3 * time.time())
        new = {key: v for key, v in values.items() if not self._past.holds(step, self._upto(key))}
        if new:
            client.log_batch(run_id, [entities.Metric(k, v, now, step) for k, v in new.items()])

    def close(self, error: BaseException | None = None) -> None:
        """End the run: finished; failed after an error; killed where the user or system did it."""
        if self._client is not None:
            failed = "FAILED" if isinstance(error, Exception) else "KILLED"
            self._client.set_terminated(self.run_id, "FINISHED" if error is None else failed)
        self._client = None

    def state_dict(self) -> dict[str, Any]:
        """The run's id; a run is made if there is none yet, so that a checkpoint can name it."""
        if self.run_id is None:
            self._open()
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run of this id."""
        if state["run_id"] != self.run_id:
            self.close()
        self.run_id, self._last = state["run_id"], {}
        self._is_taken_up = self._past.is_resumed = True

    def _open(self) -> tuple[Any, str]:
        if self._client is None:
            mlflow = import_module("mlflow")  # here: it is optional
            self._client = mlflow.MlflowClient(tracking_uri=self._tracking_uri)
            self._last = {}
            if self.run_id is None:
                self.run_id = self._make()
            else:
                self._client.update_run(self.run_id, status="RUNNING")
        assert self.run_id is not None
        return self._client, self.run_id

    def _make(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        number = (
            self._client.create_experiment(self._experiment)
            if found is None
            else found.experiment_id
        )
        run = self._client.create_run(number, run_name=self._run_name, tags=self._tags)
        return run.info.run_id

    def _upto(self, key: str) -> int | None:
        """The newest step that a run which goes on had of this key: asked once a key."""
        if not self._is_taken_up:
            return None
        if key not in self._last:
            rows = self._client.get_metric_history(self.run_id, key)
            self._last[key] = max((row.step for row in rows), default=None)
        return self._last[key]
