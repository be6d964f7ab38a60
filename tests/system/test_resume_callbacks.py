"""Callbacks with a memory go on as if nothing had happened."""

from __future__ import annotations

import csv
import json
import warnings

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from resuming import Run, differences

from mlx_fit import (
    EMA,
    SWA,
    Callback,
    CSVLogger,
    FreezeUntil,
    GradientMonitor,
    JSONLogger,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    Timer,
)


class Crash(RuntimeError):
    pass


class CrashAt(Callback):
    """Raises in a hook, after so many calls."""

    def __init__(self, hook, after):
        def crash(*args):
            nonlocal after
            after -= 1
            if after == 0:
                raise Crash

        setattr(self, hook, crash)


MAKERS = {
    "EMA": lambda folder: [EMA(0.9)],
    "EMA and a file": lambda folder: [EMA(0.9), ModelCheckpoint(folder / "{epoch}.safetensors")],
    "SWA": lambda folder: [SWA(1, every=2)],
    "plateau": lambda folder: [ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=9.0)],
    "scheduler": lambda folder: [LearningRateScheduler(lambda epoch, rate: rate * 0.7)],
    "frozen": lambda folder: [FreezeUntil(2, "first")],
    "norms": lambda folder: [GradientMonitor()],
}


def run_of(name, folder, directory=None):
    run = Run(directory, epochs=4)
    run.trainer.optimizer = optim.AdamW(1e-2)
    run.arguments["callbacks"] = MAKERS[name](folder)
    return run


def outcome_of(run):
    outcome = run.outcome()
    for callback in run.arguments["callbacks"]:
        if isinstance(callback, (EMA, SWA)):
            outcome["count"] = callback.num_averaged
            averages = callback.state_dict()["averages"]
            outcome |= {f"average.{k}": np.array(v).tobytes() for k, v in averages.items()}
    return outcome


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("hook", "after"),
    [
        ("on_train_batch_end", 5),
        ("on_train_batch_end", 19),
        ("on_epoch_begin", 3),
        ("on_test_batch_end", 7),
        ("on_epoch_end", 2),
    ],
)
def test_a_callbacks_memory_is_part_of_the_run(tmp_path, name, hook, after):
    whole = run_of(name, tmp_path / "whole")
    whole.go()
    stopped = run_of(name, tmp_path / "cut", tmp_path / "checkpoints")
    with pytest.raises(Crash):
        stopped.go(CrashAt(hook, after))
    resumed = run_of(name, tmp_path / "cut", tmp_path / "checkpoints")
    resumed.go(resume=True)
    assert not differences(outcome_of(resumed), outcome_of(whole))
    for path in (tmp_path / "whole").glob("*.safetensors"):
        mine, theirs = mx.load(str(tmp_path / "cut" / path.name)), mx.load(str(path))
        assert all(mx.array_equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("after", [1, 4, 8])
def test_averages_in_a_validation_that_fails_are_not_taken_for_the_weights(tmp_path, after):
    def run(directory=None):
        made = run_of("EMA", tmp_path, directory)
        made.arguments["validation_freq"] = "3 steps"
        return made

    whole = run()
    whole.go()
    with pytest.raises(Crash):
        run(tmp_path / "checkpoints").go(CrashAt("on_test_batch_end", after))
    resumed = run(tmp_path / "checkpoints")
    resumed.go(resume=True)
    assert not differences(outcome_of(resumed), outcome_of(whole))


def test_a_time_budget_that_is_spent_stays_spent(tmp_path):
    first = Run(tmp_path)
    history = first.go(Timer("1ms"))
    assert history.stopped_by == "Timer"
    resumed = Run(tmp_path)
    again = resumed.go(Timer("1ms"), resume=True)
    assert again.stopped_by == "Timer"
    assert resumed.trainer.step == first.trainer.step
    whole, longer = Run(None), Run(tmp_path)
    whole.go(Timer("1h"))
    longer.go(Timer("1h"), resume=True)
    assert not differences(longer.outcome(), whole.outcome())


def logged(folder, directory, stops):
    """Rows of the files of a run that crashed at several batches, or at none."""

    def watchers():
        return [CSVLogger(folder / "a.csv"), JSONLogger(folder / "a.jsonl"), TensorBoard(folder)]

    for after in stops:
        with pytest.raises(Crash):
            Run(directory, epochs=4).go(
                *watchers(), CrashAt("on_train_batch_end", after), resume="auto"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Run(directory, epochs=4).go(*watchers(), resume="auto" if directory else False)
    with (folder / "a.csv").open(newline="") as file:
        table = list(csv.reader(file))
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    return table, lines


def test_files_of_a_resumed_run_hold_each_row_once(tmp_path):
    whole = logged(tmp_path / "whole", None, [])
    cut = logged(tmp_path / "cut", tmp_path / "checkpoints", [11, 3, 9])
    assert cut == whole


def test_curves_of_a_resumed_run_are_whole(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(folder):
        events = EventAccumulator(str(folder / "train"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("epoch_loss")]

    logged(tmp_path / "whole", None, [])
    logged(tmp_path / "cut", tmp_path / "checkpoints", [11, 3, 9])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
