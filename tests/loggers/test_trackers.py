"""WandbLogger and MLflowLogger against the real packages, offline."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from toys import Do, raising, ramp, trainer_of

from mlx_fit import ConfigurationError, LoggerCallback
from mlx_fit.loggers import MLflowLogger, WandbLogger, base

TESTS = os.path.dirname(os.path.dirname(__file__))


def fit(logger, epochs=2, more=(), **options):
    callbacks = [*more, LoggerCallback(logger, options.pop("every", 1))]
    trainer = trainer_of(gradient_accumulation=options.pop("accumulation", 1))
    return trainer.fit(ramp(2), ramp(1), epochs=epochs, callbacks=callbacks, verbose=0, **options)


def killed_after(tmp_path, logger, step):
    """A fit with a checkpoint after step 2, in a process that is killed at ``step``."""
    code = f"""
    import os, signal, sys
    sys.path.insert(0, {TESTS!r})
    from pathlib import Path
    from toys import Do, ramp, trainer_of
    from mlx_fit import CheckpointPolicy, LoggerCallback
    from mlx_fit.loggers import MLflowLogger, WandbLogger
    folder = Path({str(tmp_path)!r})
    def kill(trainer):
        if trainer.step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
    callbacks = [LoggerCallback({logger}, 1), Do("on_train_batch_end", kill)]
    policy = CheckpointPolicy("2 steps", background=False)
    trainer_of().fit(ramp(2), ramp(1), epochs=3, callbacks=callbacks, verbose=0,
                     checkpoint_dir=folder / "saved", checkpoint_every=policy)
    """
    # Not with the service of this process, which would think that the run is still open.
    env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == -9, done.stderr.decode()


def resumed(tmp_path, logger, **options):
    options |= {"checkpoint_dir": tmp_path / "saved", "checkpoint_every": "2 steps"}
    history = fit(logger, 3, resume="auto", **options)
    assert history.epoch == [0, 1, 2]
    return history


def test_a_missing_package_is_named_at_once(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="WandbLogger needs the package wandb: pip"):
        WandbLogger()
    with pytest.raises(ConfigurationError, match="MLflowLogger needs the package mlflow: pip"):
        MLflowLogger()


# --- MLflow ---------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """The client of a store of files, and the logger's arguments for it."""
    pytest.importorskip("mlflow", reason="mlflow is not installed (pip install mlflow-skinny)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    uri = f"file://{tmp_path}/runs"
    return MlflowClient(tracking_uri=uri), {"tracking_uri": uri, "experiment": "toys"}


def steps(client, run_id, key):
    return [row.step for row in client.get_metric_history(run_id, key)]


def test_mlflow_has_curves_parameters_and_status(mlflow):
    client, options = mlflow
    logger = MLflowLogger(run_name="a", tags={"kind": "toy"}, **options)
    history = fit(logger)
    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["kind"] == "toy"
    assert run.data.tags["mlflow.runName"] == "a"
    assert run.data.params["loss"] == "mse"
    assert run.data.metrics["loss"] == pytest.approx(history.history["loss"][-1])
    assert steps(client, logger.run_id, "loss") == [2, 4]
    assert steps(client, logger.run_id, "val_loss") == [2, 4]
    assert steps(client, logger.run_id, "batch_loss") == [1, 2, 3, 4]


def test_mlflow_goes_on_after_a_kill_with_each_step_once(mlflow, tmp_path):
    client, options = mlflow
    killed_after(tmp_path, f"MLflowLogger(**{options!r})", 4)
    logger = MLflowLogger(**options)
    resumed(tmp_path, logger)
    (found,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    assert found.info.run_id == logger.run_id
    assert found.info.status == "FINISHED"
    assert steps(client, logger.run_id, "batch_loss") == [1, 2, 3, 4, 5, 6]
    assert steps(client, logger.run_id, "val_loss") == [2, 4, 6]
    assert found.data.params["epochs"] == "3"


def test_mlflow_notes_a_changed_parameter(mlflow, tmp_path):
    client, options = mlflow
    saved = {"checkpoint_dir": tmp_path / "saved", "resume": "auto"}
    first, second = MLflowLogger(**options), MLflowLogger(**options)
    fit(first, 2, **saved)
    fit(second, 3, **saved)
    run = client.get_run(first.run_id)
    assert second.run_id == first.run_id
    assert run.data.params["epochs"] == "2"
    assert run.data.tags["resumed.epochs"] == "3"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_says_how_a_run_ended(mlflow, error, status):
    client, options = mlflow
    logger = MLflowLogger(**options)
    with pytest.raises(type(error)):
        fit(logger, more=[Do("on_epoch_end", raising(error), 1)])
    assert client.get_run(logger.run_id).info.status == status


def test_a_logger_that_is_used_anew_says_what_it_leaves_out(mlflow):
    _, options = mlflow
    first = MLflowLogger(**options)
    fit(first, 2)
    with pytest.warns(UserWarning, match="has values up to step 4 already"):
        fit(MLflowLogger(run_id=first.run_id, **options), 1)


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The logger's arguments for a folder."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return {"mode": "offline", "dir": str(tmp_path), "project": "toys"}


def records_of(data):
    """The records of a file of W&B: LevelDB's log format after 7 bytes of its own."""
    parts, at = b"", 7
    while at + 7 < len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):
            return  # still being written
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def rows_of(tmp_path, exits=1):
    """The history rows of all sessions, in order, the ids of their runs, and how they ended.

    W&B's service writes the end of a file after ``finish()`` has returned: so many are awaited.
    """
    deadline = time.monotonic() + 60
    while len((found := read_rows(tmp_path))[2]) < exits:
        assert time.monotonic() < deadline, f"W&B has not written {exits} ends of a run: {found}"
        time.sleep(0.05)
    return found


def read_rows(tmp_path):
    from wandb.proto import wandb_internal_pb2

    rows, ids, codes = [], [], []
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):  # named by time
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
            elif record.HasField("run"):
                ids.append(record.run.run_id)
            elif record.HasField("exit"):
                codes.append(record.exit.exit_code)
    return rows, set(ids), codes


def test_wandb_has_a_row_for_each_step(wandb, tmp_path):
    logger = WandbLogger(name="a", **wandb)
    history = fit(logger)
    rows, ids, codes = rows_of(tmp_path)
    assert ids == {logger.id}
    assert codes == [0]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows if "loss" in row] == history.history["loss"]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == history.history["val_loss"]


def test_wandb_goes_on_with_the_same_run_after_a_kill(wandb, tmp_path):
    killed_after(tmp_path, f"WandbLogger(**{wandb!r})", 5)
    logger = WandbLogger(**wandb)
    resumed(tmp_path, logger)
    rows, ids, _ = rows_of(tmp_path)
    assert ids == {logger.id}
    assert [row["_step"] for row in rows][-2:] == [5, 6]


def test_wandb_goes_on_after_an_interruption_with_each_step_once(wandb, tmp_path):
    saved = {"checkpoint_dir": tmp_path / "saved", "checkpoint_every": "2 steps", "resume": "auto"}
    interrupt = Do("on_train_batch_end", lambda _: signal.raise_signal(signal.SIGINT), 0)
    first, second = WandbLogger(**wandb), WandbLogger(**wandb)
    fit(first, 3, more=[interrupt], **saved)
    time.sleep(1.1)  # wandb names a session's folder by the second
    fit(second, 3, **saved)
    rows, ids, _ = rows_of(tmp_path, exits=2)
    assert ids == {first.id} == {second.id}
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_what_a_run_of_wandb_has_already_is_left_out(wandb):
    rows = []
    config = SimpleNamespace(update=lambda *args, **options: None)
    run = SimpleNamespace(id="a", starting_step=3, config=config)
    run.log = lambda values, step: rows.append(step)
    logger = WandbLogger(run=run)
    logger.load_state_dict({"id": "a"})
    fit(logger)
    assert rows == [3, 4, 4, 4]


def test_wandb_is_told_of_a_failure(wandb, tmp_path):
    with pytest.raises(KeyError):
        fit(WandbLogger(**wandb), more=[Do("on_epoch_end", raising(KeyError("x")), 1)])
    assert rows_of(tmp_path)[2] == [1]


def test_a_run_that_was_given_stays_open(wandb):
    import wandb as package

    run = package.init(reinit="create_new", **wandb)
    logger = WandbLogger(run=run)
    fit(logger)
    assert logger.id == run.id
    run.log({"after": 1.0}, step=9)
    run.finish()


@pytest.mark.parametrize("options", [{"id": "a"}, {"config": {}}, {"resume": True}])
def test_what_the_logger_decides_cannot_be_given(wandb, options):
    with pytest.raises(ConfigurationError, match=f"WandbLogger: {next(iter(options))} cannot"):
        WandbLogger(**wandb, **options)
    with pytest.raises(ConfigurationError, match="run= is open already"):
        WandbLogger("toys", run=object())
