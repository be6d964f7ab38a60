"""TensorBoard and the report's page as a person sees them, in headless Chromium."""

import itertools
import os
import shutil
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from browser import found_browser, opened
from test_tensorboard_server import served, wait_for
from toys import Do, raising, ramp, trainer_of

from mlx_fit import CheckpointPolicy, JSONLogger, TensorBoard, Trainer, datasets
from mlx_fit.cli import main

pytestmark = pytest.mark.usefixtures("browser")


@pytest.fixture
def browser():
    """Skips before anything is trained for nothing."""
    return found_browser()


PATHS = """[...document.querySelectorAll('line-chart')].map(chart =>
    [...chart.querySelectorAll('.series-view > svg path')]
        .filter(path => path.getBoundingClientRect().width > 0)
        .map(path => path.getAttribute('d')))"""


CLOSE_SETTINGS = """[...document.querySelectorAll('button')]
    .find(button => button.innerText.trim().endsWith('Settings')).click()"""


def points_of(path):
    """The points of a line ``M1,2L3,4``."""
    return [tuple(map(float, point.split(","))) for point in path.lstrip("M").split("L")]


def fit_digits(folder, more=()):
    images, labels = datasets.digits()
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    trainer = Trainer(model, optim.Adam(1e-3), "cross_entropy", ["accuracy"], seed=0)
    trainer.fit(
        (images.reshape(-1, 64)[:1500], labels[:1500]),
        (images.reshape(-1, 64)[1500:], labels[1500:]),
        epochs=10,
        callbacks=[TensorBoard(folder / "runs" / "digits"), *more],
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=CheckpointPolicy("4 epochs", background=False),
        resume="auto",
        verbose=0,
    )


def test_a_resumed_run_draws_one_continuous_curve(tmp_path):
    """The files hold a run that broke off in its seventh epoch and was resumed from the fourth."""
    breaks = Do("on_epoch_end", raising(OSError("power cut")), 6)
    with pytest.raises(OSError, match="power cut"):
        fit_digits(tmp_path, [breaks])
    for path in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)  # what an exception leaves: a power cut would not
    fit_digits(tmp_path)
    with served(tmp_path / "runs") as url:
        for run in ("digits/train", "digits/validation"):
            wait_for(url, run)
        address = f"{url}?tagFilter=epoch_(loss%7Caccuracy)&smoothing=0#timeseries"
        with opened(address, 1280, 560) as page:
            page.wait_for(f"{PATHS}.filter(paths => paths.length == 2).length == 2")
            page.value(CLOSE_SETTINGS)
            page.wait_for(f"{PATHS}.filter(paths => paths.length == 2).length == 2")
            time.sleep(1)  # the cards grow into the room
            curves = [points_of(path) for paths in page.value(PATHS) for path in paths]
            picture = page.picture()
    assert [len(curve) for curve in curves] == [10] * 4  # train and validation, ten epochs each
    for curve in curves:
        across = [x for x, _ in curve]
        steps = [after - before for before, after in itertools.pairwise(across)]
        assert steps == pytest.approx([steps[0]] * 9, rel=1e-3)
        assert steps[0] > 0
    keep(picture, "tensorboard.png")


def test_the_reports_page_draws_its_curves(tmp_path):
    for name, rate in (("a", 0.01), ("b", 0.02)):
        log = JSONLogger(tmp_path / name / "log.jsonl")
        trainer_of(learning_rate=rate).fit(ramp(4), ramp(2), epochs=5, callbacks=log, verbose=0)
    logs = [str(tmp_path / name / "log.jsonl") for name in "ab"]
    target = tmp_path / "report.html"
    assert main(["report", *logs, "-o", str(target)]) == 0
    with opened(target.as_uri(), 1000, 900) as page:
        page.wait_for("document.readyState == 'complete'")
        sizes = page.value(
            "[...document.querySelectorAll('polyline')].map(line => line.getBoundingClientRect())"
            ".map(box => [box.width, box.height])"
        )
        wide = page.value("document.documentElement.scrollWidth")
        picture = page.picture()
    assert sum(width > 100 for width, _ in sizes) >= 8  # four keys or more of two runs
    assert wide <= 1000  # nothing stands out of the window
    keep(picture, "report.png")


def keep(picture, name):
    """Where MLX_FIT_PICTURES says so, the picture is kept: docs/images is made like that."""
    if folder := os.environ.get("MLX_FIT_PICTURES"):
        Path(folder, name).write_bytes(picture)
