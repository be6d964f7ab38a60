"""The files of TensorBoard, looked at through the real ``tensorboard`` server on this machine."""

import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import mlx.nn as nn
import numpy as np
import pytest
from toys import Do, trainer_of

from mlx_fit import Callback, GradientMonitor, LambdaCallback, Predictions, TensorBoard, metrics

pytest.importorskip("tensorboard")


class Samples(Callback):
    """What a user writes beside the curves."""

    def __init__(self, board):
        self.board = board

    def on_epoch_end(self, epoch, logs):
        images = np.random.default_rng(epoch).random((4, 8, 6, 3))
        self.board.add_image("samples", images, epoch)
        self.board.add_text("note", f"**epoch** {epoch}", epoch)


def data(count=48):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 8)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0)


def fit_two_parts(folder):
    """A run that was killed after its third epoch and resumed from a state of the second."""
    curve = {
        "true_positives": [4, 3, 1],
        "false_positives": [4, 1, 0],
        "true_negatives": [0, 3, 4],
        "false_negatives": [0, 1, 3],
    }
    adds = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(val_pr=curve))
    states = []

    def callbacks(board):
        predictions = Predictions(data(6), folder, class_names=["a", "b", "c"])
        return [adds, GradientMonitor(), Samples(board), board, predictions]

    def run(epochs, more, board, **options):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        kinds = ["accuracy", metrics.ConfusionMatrix()]
        trainer = trainer_of(model, loss="cross_entropy", metrics=kinds, batch_size=12)
        options = {"epochs": epochs, "callbacks": [*callbacks(board), *more]} | options
        return trainer.fit(data(), data(24), verbose=0, **options)

    first = TensorBoard(folder, 1, 2, hparams={"width": 8, "name": "a", "deep": True})
    keep = Do("on_epoch_end", lambda _: states.append(json.dumps(first.state_dict())), 1)
    history = run(3, [keep], first)
    second = TensorBoard(folder, 1, 2, hparams={"width": 8, "name": "a", "deep": True})
    load = Do("on_train_begin", lambda _: second.load_state_dict(json.loads(states[0])))
    after = run(4, [load], second, initial_epoch=2)
    return history.history["loss"][:2] + after.history["loss"]


@contextmanager
def served(folder):
    """The address of a TensorBoard server that shows the folder."""
    code = "import sys; from tensorboard.main import run_main; sys.exit(run_main())"
    command = [sys.executable, "-W", "ignore", "-c", code, "--logdir", str(folder)]
    command += ["--port", "0", "--host", "127.0.0.1", "--load_fast", "false"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as process:
        try:
            for line in process.stderr:
                if match := re.search(r"at (http://127\.0\.0\.1:\d+/)", line):
                    yield match[1]
                    break
            else:
                pytest.fail("tensorboard did not start")
        finally:
            process.kill()


def ask(url, path, body=None, raw=False, **query):
    request = urllib.request.Request(
        f"{url}data/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else ""),
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = answer.read()
    return found if raw else json.loads(found)


def wait_for(url, run):
    for _ in range(100):
        if run in ask(url, "runs"):
            return
        time.sleep(0.1)
    pytest.fail(f"tensorboard shows only {ask(url, 'runs')}")


def test_every_tag_is_served_by_the_real_server(tmp_path):
    losses = fit_two_parts(tmp_path)
    with served(tmp_path) as url:
        for run in ("train", "validation", "predictions"):
            wait_for(url, run)
        check_scalars(url, losses)
        check_pictures(url)
        check_the_rest(url)
        check_hparams(url)


def check_scalars(url, losses):
    tags = ask(url, "plugin/scalars/tags")
    assert set(tags["validation"]) >= {
        "epoch_loss",
        "epoch_accuracy",
        "evaluation_loss_vs_iterations",
    }
    assert set(tags["train"]) >= {
        *("epoch_loss", "epoch_accuracy", "epoch_learning_rate", "batch_loss", "batch_accuracy"),
        *("epoch_grad_norm", "epoch_layer_grad_norms/layers.0", "epoch_layer_grad_norms/layers.2"),
        *("perf/step_time_ms", "perf/data_wait_ms", "perf/examples_per_second"),
        *("perf/active_memory_mib", "perf/cache_memory_mib", "perf/peak_memory_mib"),
    }
    steps = {
        ("train", "epoch_loss"): [0, 1, 2, 3],
        ("train", "perf/step_time_ms"): [0, 1, 2, 3],
        ("train", "batch_loss"): [2, 4, 6, 8, 10, 12, 14, 16],
        ("validation", "epoch_loss"): [0, 1, 2, 3],
    }
    for (run, tag), expected in steps.items():
        points = ask(url, "plugin/scalars/scalars", run=run, tag=tag)
        assert [step for _, step, _ in points] == expected, (run, tag)
    points = ask(url, "plugin/scalars/scalars", run="train", tag="epoch_loss")
    assert [value for _, _, value in points] == pytest.approx(losses, rel=1e-5)


def check_pictures(url):
    image = pytest.importorskip("PIL.Image")
    tags = ask(url, "plugin/images/tags")
    assert set(tags["train"]) >= {"samples", "epoch_confusion_matrix"}
    assert "epoch_confusion_matrix" in tags["validation"]
    for run, tag, size in (
        ("train", "samples", (12, 16)),
        ("validation", "epoch_confusion_matrix", (96, 96)),
    ):
        query = {"run": run, "tag": tag, "sample": 0}
        (*_, last) = ask(url, "plugin/images/images", **query)
        png = ask(url, f"plugin/images/individualImage?{last['query']}", raw=True)
        assert image.open(io.BytesIO(png)).size == size


def check_the_rest(url):
    assert set(ask(url, "plugin/histograms/tags")["train"]) >= {
        f"weights/layers.{n}.{name}" for n in (0, 2) for name in ("weight", "bias")
    }
    shown = ask(url, "plugin/histograms/histograms", run="train", tag="weights/layers.0.weight")
    assert [step for _, step, _ in shown] == [0, 1, 2, 3]
    assert sum(count for _, _, count in shown[-1][2]) == pytest.approx(64)
    assert set(ask(url, "plugin/text/tags")["train"]) == {"note/text_summary"}
    texts = ask(url, "plugin/text/text", run="train", tag="note/text_summary")
    assert "<strong>epoch</strong> 3" in texts[-1]["text"]
    predicted = ask(url, "plugin/text/text", run="predictions", tag="predictions/text_summary")
    assert [text["step"] for text in predicted] == [0, 1, 2, 3]
    assert "<table>" in predicted[-1]["text"]
    assert "epoch_pr" in ask(url, "plugin/pr_curves/tags")["validation"]
    curve = ask(url, "plugin/pr_curves/pr_curves", run="validation", tag="epoch_pr")
    assert curve["validation"][-1]["precision"] == [0.5, 0.75, 1.0]
    assert curve["validation"][-1]["recall"] == [1.0, 0.75, 0.25]


def check_hparams(url):
    body = {"experimentName": ""}
    found = ask(url, "plugin/hparams/experiment", body)
    assert {info["name"] for info in found["hparamInfos"]} >= {
        "width",
        "learning_rate",
        "optimizer",
    }
    assert "final_val_accuracy" in {info["name"]["tag"] for info in found["metricInfos"]}
    body |= {"allowedStatuses": ["STATUS_SUCCESS", "STATUS_RUNNING", "STATUS_UNKNOWN"]}
    body |= {"colParams": [{"metric": info["name"]} for info in found["metricInfos"]]}
    body |= {"startIndex": 0, "sliceSize": 10}
    (group,) = ask(url, "plugin/hparams/session_groups", body)["sessionGroups"]
    assert group["hparams"]["width"] == 8
    assert group["hparams"]["name"] == "a"
    assert group["hparams"]["deep"] is True
    (session,) = group["sessions"]
    assert session["status"] == "STATUS_SUCCESS"
    values = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
    for run, tag, key in (
        ("train", "epoch_loss", "loss"),
        ("validation", "epoch_loss", "val_loss"),
    ):
        points = ask(url, "plugin/scalars/scalars", run=run, tag=tag)
        assert values[f"final_{key}"] == pytest.approx(points[-1][2])
