"""A run that is stopped anywhere and resumed ends with the bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from resuming import BATCH, ROWS, STEPS_PER_EPOCH, Run, differences

from mlx_fit import (
    Callback,
    CheckpointPolicy,
    ModelCheckpoint,
    Preempted,
    ResumeError,
    Trainer,
)
from mlx_fit.trainable import trainable_names

OPTIONS = {
    "plain": {},
    "loader with noise": {"loader": True},
    "accumulation over a short window": {"trainer": {"gradient_accumulation": 3}},
    "joined passes": {"steps_per_epoch": 5, "epochs": 4},
    "validation inside epochs": {"validation_freq": "3 steps"},
    "float16": {"trainer": {"precision": "mixed_float16"}},
}


@pytest.fixture(scope="module")
def whole():
    """The outcome of a run that nobody stops, by its options."""
    known = {}

    def outcome(**options):
        key = repr(options)
        if key not in known:
            run = Run(**options)
            run.go()
            known[key] = run.outcome()
        return known[key]

    return outcome


class Crash(RuntimeError):
    pass


class CrashAt(Callback):
    """Raises after so many batches, or in another hook."""

    def __init__(self, hook="on_train_batch_end", after=1):
        def crash(*args):
            nonlocal after
            after -= 1
            if after == 0:
                raise Crash("here")

        setattr(self, hook, crash)


class SignalAt(CrashAt):
    """Sends this process a signal instead."""

    def __init__(self, number, hook="on_train_batch_end", after=1):
        def send(*args):
            nonlocal after
            after -= 1
            if after == 0:
                os.kill(os.getpid(), number)

        setattr(self, hook, send)


@pytest.mark.parametrize("stop", [1, 3, 8, 11, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_ended_early_goes_on_bit_for_bit(tmp_path, whole, name, stop):
    options = OPTIONS[name]
    Run(tmp_path, **options).go(max_steps=stop)
    resumed = Run(tmp_path, **options)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole(**options))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_begin"])
@pytest.mark.parametrize("after", [2, 5, 8, 13])
@pytest.mark.parametrize("name", ["plain", "loader with noise", "accumulation over a short window"])
def test_an_exception_leaves_a_checkpoint_even_inside_a_window(tmp_path, whole, name, after, hook):
    options = OPTIONS[name]
    with pytest.raises(Crash):
        Run(tmp_path, **options).go(CrashAt(hook, after))
    resumed = Run(tmp_path, **options)
    resumed.go(resume=True)
    outcome, expected = resumed.outcome(), whole(**options)
    if hook == "on_train_batch_begin":
        # The hook of the batch that was drawn and not trained on.
        assert outcome["losses"] == expected["losses"]
    assert not differences(outcome, expected)


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_validation_end", "on_test_batch_end"])
def test_an_exception_in_an_epochs_end_repeats_that_end(tmp_path, whole, hook):
    with pytest.raises(Crash):
        Run(tmp_path).go(CrashAt(hook, 1))
    resumed = Run(tmp_path)
    resumed.go(resume="auto")
    assert not differences(resumed.outcome(), whole())


def test_an_exception_at_an_epochs_begin_goes_on_from_the_epoch_before(tmp_path, whole):
    with pytest.raises(Crash):
        Run(tmp_path).go(CrashAt("on_epoch_begin", 2), checkpoint_every="100 steps")
    resumed = Run(tmp_path)
    resumed.go(resume=True, checkpoint_every="100 steps")
    assert not differences(resumed.outcome(), whole())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("hook", "after"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", STEPS_PER_EPOCH),
        ("on_train_batch_begin", 10),
        ("on_test_batch_end", 1),
        ("on_test_batch_end", 3),
        ("on_epoch_begin", 2),
        ("on_epoch_end", 1),
        ("on_validation_end", 2),
    ],
)
@pytest.mark.parametrize("name", ["plain", "accumulation over a short window"])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on(
    tmp_path, whole, name, hook, after, number
):
    options = OPTIONS[name]
    stopped = Run(tmp_path, **options)
    if number == signal.SIGTERM:
        with pytest.raises(Preempted) as raised:
            stopped.go(SignalAt(number, hook, after))
        assert raised.value.code == 143
    else:
        assert stopped.go(SignalAt(number, hook, after)).stopped_by == "SIGINT"
    resumed = Run(tmp_path, **options)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole(**options))


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", ["plain", "validation inside epochs"])
def test_signals_in_the_same_validation_again_and_again(tmp_path, whole, name, times):
    options = OPTIONS[name]
    for _ in range(times):
        Run(tmp_path, **options).go(SignalAt(signal.SIGINT, "on_test_batch_end", 1), resume="auto")
    resumed = Run(tmp_path, **options)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole(**options))


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_signal_in_a_validation_inside_an_epoch(tmp_path, whole, after):
    options = OPTIONS["validation inside epochs"]
    Run(tmp_path, **options).go(SignalAt(signal.SIGINT, "on_test_batch_end", after))
    resumed = Run(tmp_path, **options)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole(**options))


@pytest.mark.parametrize("stop", [1, 3, 11])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_of_weight_zero_alone_may_be_left(tmp_path, stop, accumulation):
    def run(directory):
        made = Run(directory, trainer={"gradient_accumulation": accumulation}, shuffle=False)
        made.train = (*made.train, (np.arange(ROWS) < 3).astype(np.float32))
        made.ids.on_train_batch_end = lambda batch, logs: None  # most batches have no loss
        return made

    whole = run(None)
    whole.go()
    run(tmp_path).go(max_steps=stop)
    resumed = run(tmp_path)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole.outcome())


def test_several_resumes_in_one_epoch(tmp_path, whole):
    for stop in (1, 2, 5, 9, 10):
        Run(tmp_path).go(max_steps=stop, resume="auto")
    resumed = Run(tmp_path)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole())


@pytest.mark.parametrize("every", ["1 steps", "3 steps", "epoch"])
@pytest.mark.parametrize("background", [True, False])
def test_any_checkpoint_of_a_run_can_be_the_start(tmp_path, whole, every, background):
    policy = CheckpointPolicy(every, keep_last=None, background=background)
    Run(tmp_path).go(checkpoint_every=policy)
    saved = sorted(path for path in tmp_path.iterdir())
    steps = {"1 steps": 16, "3 steps": 6, "epoch": 2}[every]
    assert len(saved) == steps
    for path in saved[:: max(steps // 4, 1)]:
        resumed = Run(None)
        resumed.go(resume=path)
        assert not differences(resumed.outcome(), whole()), path.name


def test_saving_does_not_change_the_run(tmp_path, whole):
    run = Run(tmp_path)
    run.go(checkpoint_every="1 steps")
    assert not differences(run.outcome(), whole())


def test_a_finished_run_takes_no_step_and_returns_its_history(tmp_path, whole):
    Run(tmp_path).go()
    again = Run(tmp_path)
    ends = []

    class End(Callback):
        def on_train_end(self, logs):
            ends.append(dict(logs))

        def on_train_batch_end(self, batch, logs):
            raise AssertionError("a step was taken")

    again.go(End(), resume=True)
    assert not differences(again.outcome(), whole())
    assert [end["val_loss"] for end in ends] == [again.history.history["val_loss"][-1]]


def test_a_run_that_stopped_early_stays_stopped_unless_patience_grows(tmp_path):
    def stopping(patience):
        run = Run(tmp_path, epochs=12)
        run.stopping.patience = patience
        run.stopping._monitor._min_delta = 100.0
        return run

    first = stopping(2).go()
    assert first.epoch == [0, 1, 2]
    same = stopping(2).go(resume=True)
    assert (same.epoch, same.stopped_by) == ([0, 1, 2], "EarlyStopping")
    longer = stopping(4).go(resume=True)
    assert longer.epoch == [0, 1, 2, 3, 4]


def test_more_epochs_go_on_with_the_same_object(tmp_path):
    expected = Run(None, epochs=4)
    expected.go()
    run = Run(tmp_path)
    run.go(epochs=2)
    run.ids.losses = []
    run.go(epochs=4, resume=True)
    assert not differences(run.outcome(), expected.outcome())


def test_a_fresh_process_goes_on_bit_for_bit(tmp_path, whole):
    code = (
        "import sys; from resuming import Run; import json\n"
        "run = Run(sys.argv[1], loader=True); run.go(resume='auto', max_steps=int(sys.argv[2]))\n"
        "print(json.dumps({k: v.hex() if isinstance(v, bytes) else v "
        "for k, v in run.outcome().items()}))"
    )
    for steps in (5, 11, 100):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path, str(steps)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
    found = json.loads(done.stdout)
    expected = whole(loader=True)
    plain = {k: v.hex() if isinstance(v, bytes) else v for k, v in expected.items()}
    assert not differences(found, json.loads(json.dumps(plain)))


# --- what a model keeps beside its weights -------------------------------------------------------


class Centred(nn.Module):
    """Subtracts a running mean, kept in a buffer; keeps its newest input, too."""

    def __init__(self):
        super().__init__()
        self._mean = mx.zeros((6,))
        self._seen = None
        self._newest = None

    def __call__(self, x):
        if self.training:
            self._mean = 0.9 * self._mean + 0.1 * x.mean(0)
            self._seen = x.mean(0) if self._seen is None else self._seen + x.mean(0)
        self._newest = x * 2
        return x - self._mean


def keeping(directory, **options):
    """A run whose layers have a buffer, and running statistics wider than they were made."""
    run = Run(directory, **options)
    model = nn.Sequential(Centred(), nn.Linear(6, 3), nn.BatchNorm(3))
    norm = model.layers[2]
    norm.running_mean = norm.running_mean.astype(mx.float16)
    mx.eval(model.state)
    run.trainer.model = model
    run.stopping._restores = False
    return run


@pytest.mark.parametrize("stop", [2, 7, 10])
@pytest.mark.parametrize("options", [{}, {"validation_freq": "2 steps"}])
@pytest.mark.parametrize("compiled", [True, False])
def test_buffers_and_their_dtypes_come_back(tmp_path, stop, options, compiled):
    options = options | {"trainer": {"batch_size": 5, "compile": compiled}}
    whole = keeping(None, **options)
    whole.go()
    keeping(tmp_path, **options).go(max_steps=stop, checkpoint_every="2 steps")
    resumed = keeping(tmp_path, **options)
    resumed.go(resume=True, checkpoint_every="2 steps")
    assert not differences(resumed.outcome(), whole.outcome())
    for name in ("_mean", "_seen"):
        mine, theirs = (run.trainer.model.layers[0][name] for run in (resumed, whole))
        assert mx.array_equal(mine, theirs)
    assert resumed.trainer.model.layers[2].running_mean.dtype == mx.float32


def test_buffers_of_another_shape_stay_and_are_named(tmp_path):
    first = keeping(None)
    first.go(epochs=1)
    first.trainer.save(tmp_path / "all")
    other = keeping(None)
    other.trainer.model.layers[0]._mean = mx.zeros((1, 6))
    with pytest.warns(UserWarning, match=r"holds layers\.0\._mean, which"):
        other.trainer.load(tmp_path / "all")
    assert other.trainer.model.layers[0]._mean.shape == (1, 6)
    state = first.trainer.state_dict()
    for name in ("layers.0._no_grad", "layers.9._mean", "layers.0.public"):
        state["buffers"] = {name: mx.zeros((6,))}
        with pytest.warns(UserWarning, match=f"holds {name}"):
            other.trainer.load_state_dict(state)
    assert isinstance(other.trainer.model.layers[0]._no_grad, set)
    again = keeping(None)
    again.trainer.load_state_dict(first.trainer.state_dict())
    assert mx.array_equal(again.trainer.model.layers[0]._mean, first.trainer.model.layers[0]._mean)


class Freezes(Callback):
    """Freezes a layer in the second epoch, or thaws it there."""

    def __init__(self, thaws):
        self.thaws = thaws

    def on_train_begin(self, logs):
        if self.thaws:
            self.model.first.freeze()

    def on_epoch_begin(self, epoch, logs):
        if epoch == 1:
            self.model.first.unfreeze() if self.thaws else self.model.first.freeze()


@pytest.mark.parametrize("stop", [8, 11, 20])
@pytest.mark.parametrize("thaws", [True, False])
def test_what_a_callback_froze_long_ago_stays_frozen(tmp_path, stop, thaws):
    whole = Run(None, epochs=3)
    whole.go(Freezes(thaws))
    Run(tmp_path, epochs=3).go(Freezes(thaws), max_steps=stop)
    resumed = Run(tmp_path, epochs=3)
    resumed.go(Freezes(thaws), resume=True)
    assert not differences(resumed.outcome(), whole.outcome())
    assert trainable_names(resumed.trainer.model) == trainable_names(whole.trainer.model)


# --- negative controls ---------------------------------------------------------------------------


def _without_key(state):
    state.trainer["random_key"] = [1, 2]


def _without_optimizer(state):
    arrays = state.trainer["optimizer"]
    state.trainer["optimizer"] = {k: mx.zeros_like(v) for k, v in arrays.items()}


def _without_position(state):
    state.position["feed"]["num_in_pass"] = 0
    state.position["feed"]["source"]["samples_consumed"] = 0


def _without_sums(state):
    state.sums["totals"] = [0.0] * len(state.sums["totals"])


def _without_callbacks(state):
    state.callbacks = {"EarlyStopping": state.callbacks["EarlyStopping"]}


def _without_buffers(state):
    state.trainer["model"]["norm.running_mean"] = mx.zeros((12,))


def _without_rows(state):
    state.position["recorder"]["before"] = []
    state.position["recorder"]["last_window"] = 0


@pytest.mark.parametrize(
    "leave_out",
    [
        _without_key,
        _without_optimizer,
        _without_position,
        _without_sums,
        _without_callbacks,
        _without_buffers,
        _without_rows,
    ],
)
def test_a_state_without_one_part_of_it_ends_otherwise(tmp_path, whole, monkeypatch, leave_out):
    from mlx_fit.checkpoint import store

    Run(tmp_path).go(max_steps=11)
    read = store.read_checkpoint

    def damaged(path):
        state = read(path)
        leave_out(state)
        return state

    monkeypatch.setattr(store, "read_checkpoint", damaged)
    resumed = Run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of callbacks that were removed
        resumed.go(resume=True)
    assert differences(resumed.outcome(), whole())


# --- what is different now -----------------------------------------------------------------------


def test_a_checkpoint_folder_is_not_overwritten_by_accident(tmp_path):
    Run(tmp_path).go(max_steps=2)
    with pytest.raises(ResumeError, match="holds checkpoints already"):
        Run(tmp_path).go()


def test_there_must_be_something_to_resume(tmp_path, whole):
    with pytest.raises(ResumeError, match="no whole checkpoint"):
        Run(tmp_path).go(resume=True)
    run = Run(tmp_path / "new")
    run.go(resume="auto")
    assert not differences(run.outcome(), whole())


def test_changed_arguments_win_and_each_is_named_once(tmp_path):
    Run(tmp_path).go(max_steps=3)
    run = Run(tmp_path, trainer={"batch_size": 8, "clip_norm": None})
    with pytest.warns(UserWarning, match="changes") as caught:
        run.go(resume=True)
    texts = [str(w.message) for w in caught if "changes" in str(w.message)]
    assert len(texts) == 1
    assert "batch_size was 4, is now 8" in texts[0]
    assert "clip_norm was 1.0, is now None" in texts[0]
    # 12 of 32 rows were done: 3 batches of 8 (the last of 4) in this epoch, then 4.
    assert run.trainer.step == 3 + 3 + ROWS // 8


def test_a_smaller_batch_visits_the_rows_that_were_left(tmp_path):
    seen = []

    class Loud(Callback):
        def on_train_batch_end(self, batch, logs):
            seen.append(batch)

    Run(tmp_path).go(max_steps=4)
    with pytest.warns(UserWarning, match="batch_size"):
        Run(tmp_path, trainer={"batch_size": 2}).go(Loud(), resume=True, epochs=1)
    assert len(seen) == (ROWS - 4 * BATCH) // 2


def test_a_learning_rate_given_now_wins(tmp_path):
    def run(rate):
        made = Run(tmp_path)
        made.trainer.optimizer = optim.SGD(rate)
        return made

    run(0.1).go(max_steps=3)
    same, other = run(0.1), run(0.025)
    same.go(resume=True, max_steps=4)
    assert same.trainer.learning_rate == pytest.approx(0.1)
    with pytest.warns(UserWarning, match=r"optimizer\.learning_rate was 0\.1"):
        other.go(resume=True, max_steps=5)
    assert other.trainer.learning_rate == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"trainer": {"seed": 6}}, r"seed=5.*seed=6"),
        ({"initial_epoch": 1}, r"initial_epoch=0.*initial_epoch=1"),
    ],
)
def test_what_cannot_change_is_an_error_that_names_both_values(tmp_path, change, text):
    Run(tmp_path).go(max_steps=3)
    with pytest.raises(ResumeError, match=text):
        Run(tmp_path, **change).go(resume=True)


def test_other_data_is_an_error_that_names_both_lengths(tmp_path):
    Run(tmp_path).go(max_steps=3)
    run = Run(tmp_path)
    run.train = tuple(part[:-1] for part in run.train)
    with pytest.raises(ResumeError, match=r"n=32.*n=31"):
        run.go(resume=True)


def test_added_and_removed_callbacks_are_named(tmp_path):
    Run(tmp_path).go(max_steps=3)
    run = Run(tmp_path)
    with pytest.warns(UserWarning, match=r"ModelCheckpoint was added; Ids was removed"):
        run.trainer.fit(
            run.train,
            run.val,
            epochs=2,
            verbose=0,
            callbacks=[run.stopping, ModelCheckpoint(tmp_path / "w.safetensors")],
            checkpoint_dir=tmp_path,
            resume=True,
        )


def test_metrics_that_are_new_count_from_here(tmp_path):
    Run(tmp_path).go(max_steps=3)
    run = Run(tmp_path, trainer={"metrics": []})
    with pytest.warns(UserWarning, match="metrics"):
        history = run.go(resume=True)
    assert len(history.history["loss"]) == 2
    more = Run(tmp_path / "b")
    more.go(max_steps=3)
    reference = Run(None)
    reference.go(epochs=1)
    wider = Run(tmp_path / "b", trainer={"metrics": ["f1", "accuracy"]})
    with pytest.warns(UserWarning, match="metrics"):
        history = wider.go(resume=True, epochs=1)
    assert history.history["accuracy"] == reference.history.history["accuracy"]


# --- other data ----------------------------------------------------------------------------------


def batches():
    x, y = Run(None).train
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, ROWS, BATCH)]


@pytest.mark.parametrize("kind", ["list", "function", "iterable"])
def test_batches_from_outside_are_skipped_to_their_place(tmp_path, kind):
    class Iterable:
        def __iter__(self):
            return iter(batches())

    def run(directory):
        made = Run(directory)
        made.train = {
            "list": batches(),
            "function": lambda: iter(batches()),
            "iterable": Iterable(),
        }[kind]
        return made

    whole = run(None)
    whole.go()
    run(tmp_path).go(max_steps=11)
    resumed = run(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.go(resume=True)
    told = [w for w in caught if "read and discarded" in str(w.message)]
    assert len(told) == (kind != "list")
    assert not differences(resumed.outcome(), whole.outcome())


def test_an_iterator_is_read_up_to_its_place(tmp_path):
    def run(directory):
        made = Run(directory, steps_per_epoch=5, epochs=3)
        made.train = iter(batches() * 2)
        return made

    whole = run(None)
    whole.go()
    run(tmp_path).go(max_steps=7)
    resumed = run(tmp_path)
    with pytest.warns(UserWarning, match="first 7 batches"):
        resumed.go(resume=True)
    assert not differences(resumed.outcome(), whole.outcome())


def test_a_full_checkpoint_of_model_checkpoint_is_a_start_as_well(tmp_path, whole):
    folder = str(tmp_path / "best-{step}")
    Run(None).go(ModelCheckpoint(folder, save_freq=3))
    for step in (3, 9, 15):
        resumed = Run(None)
        with pytest.warns(UserWarning, match="ModelCheckpoint was removed"):
            resumed.go(resume=tmp_path / f"best-{step}")
        assert not differences(resumed.outcome(), whole())


@pytest.mark.parametrize("freq", [1, "3 steps"])
def test_model_checkpoint_saves_an_epoch_with_its_end(tmp_path, freq):
    options = {"validation_freq": freq}
    folder = tmp_path / "best"
    expected = Run(None, **options)
    expected.go(ModelCheckpoint(tmp_path / "other"))

    def checkpoint():
        return ModelCheckpoint(folder, save_best_only=True)

    Run(None, **options).go(checkpoint(), epochs=1)
    resumed = Run(None, **options)
    resumed.go(checkpoint(), resume=folder)
    assert not differences(resumed.outcome(), expected.outcome())


def test_save_and_load_of_a_trainer_carry_everything_on(tmp_path):
    whole = Run(None, epochs=4)
    whole.go()
    first = Run(None)
    first.stopping._restores = False
    first.go()
    first.trainer.save(tmp_path / "all")
    second = Run(None)
    second.trainer.load(tmp_path / "all")
    assert second.trainer.history.history == first.history.history
    second.stopping._restores = whole.stopping._restores = False
    second.go(epochs=4, resume=tmp_path / "all")
    expected = Run(None, epochs=4)
    expected.stopping._restores = False
    expected.go()
    assert not differences(second.outcome(), expected.outcome())


def test_load_alone_lets_the_next_fit_go_on(tmp_path):
    expected = Run(None, epochs=4)
    expected.stopping._restores = False
    expected.go()
    first = Run(None)
    first.stopping._restores = False
    first.go()
    first.trainer.save(tmp_path / "all")
    second = Run(None)
    second.stopping._restores = False
    second.trainer.load(tmp_path / "all")
    assert second.trainer.step == 16
    second.go(initial_epoch=2, epochs=4)
    mine, theirs = second.outcome(), expected.outcome()
    assert not [n for n in differences(mine, theirs) if n.startswith(("0.", "1.", "random"))]
    np.testing.assert_array_equal(mine["losses"], theirs["losses"][16:])


def test_a_callback_without_a_state_to_give_costs_no_history(tmp_path):
    class Broken(Callback):
        def state_dict(self):
            raise RuntimeError("no state")

    run = Run(None)
    with pytest.warns(UserWarning, match="no state"):
        history = run.go(Broken())
    assert history.epoch == [0, 1]
    run.trainer.save(tmp_path / "all")
    again = Run(None)
    again.trainer.load(tmp_path / "all")
    assert again.trainer.step == 16


def test_an_open_window_is_applied_where_accumulation_ends(tmp_path):
    with pytest.raises(Crash):
        Run(tmp_path, trainer={"gradient_accumulation": 4}).go(CrashAt("on_train_batch_end", 2))
    resumed = Run(tmp_path)
    counts = []

    class Counts(Callback):
        def on_train_batch_begin(self, batch, logs):
            counts.append(int(resumed.trainer.optimizer.step.item()))

    with pytest.warns(UserWarning, match="gradient_accumulation was 4, is now 1"):
        resumed.go(Counts(), resume=True, epochs=1)
    assert counts[:2] == [1, 2]
    assert resumed.trainer.step == 7


def test_another_schedule_wins_and_is_told(tmp_path):
    from mlx_fit.schedules import warmup_cosine

    Run(tmp_path).go(max_steps=3)
    run = Run(tmp_path)
    run.trainer.optimizer = optim.AdamW(warmup_cosine(3e-3, 40, 4))
    with pytest.warns(UserWarning, match=r"learning_rate was 'a schedule .*is now 'a schedule"):
        run.go(resume=True)
    assert run.history.history["learning_rate"][-1] < 3e-3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_compilation_ends_the_first_step(tmp_path, whole, number):
    import mlx.nn as nn

    def loss(outputs, targets):
        """Runs in Python only while the step is traced."""
        if sends:
            sends.pop()
            os.kill(os.getpid(), number)
        return nn.losses.cross_entropy(outputs, targets)

    def run(directory):
        made = Run(directory, trainer={"seed": 5})
        made.trainer = type(made.trainer)(
            made.trainer.model, made.trainer.optimizer, loss, ["accuracy"], batch_size=BATCH, seed=5
        )
        return made

    sends = []
    expected = run(None)
    expected.go()
    sends = [1]
    stopped = run(tmp_path)
    try:
        stopped.go()
    except Preempted:
        assert number == signal.SIGTERM
    assert stopped.trainer.step == 1
    resumed = run(tmp_path)
    resumed.go(resume=True)
    assert not differences(resumed.outcome(), expected.outcome())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("background", [True, False])
def test_a_signal_while_saving_lets_the_save_end(tmp_path, whole, monkeypatch, background, number):
    from mlx_fit.checkpoint import store

    write, saves = store.write_checkpoint, []

    def interrupted(folder, snapshot, hashes):
        saves.append(snapshot.document["step"])
        if len(saves) == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one starts no other save
        write(folder, snapshot, hashes)

    monkeypatch.setattr(store, "write_checkpoint", interrupted)
    policy = CheckpointPolicy("3 steps", background=background)
    with pytest.raises(Preempted):
        Run(tmp_path).go(checkpoint_every=policy)
    assert len(saves) <= 3
    assert len(set(saves)) == len(saves)
    monkeypatch.undo()
    resumed = Run(tmp_path)
    resumed.go(resume=True, checkpoint_every=policy)
    assert not differences(resumed.outcome(), whole())


class Indices(Callback):
    """Notes the index of each batch, and saves after one of them."""

    def __init__(self, path=None):
        self.path = path
        self.seen = []

    def on_train_batch_begin(self, batch, logs):
        self.seen.append(batch)

    def on_train_batch_end(self, batch, logs):
        if self.path is not None and len(self.seen) == 3:
            self.trainer.save(self.path)


def test_batches_of_an_epoch_that_goes_on_are_counted_from_where_it_was(tmp_path):
    first, rest, path = Indices(tmp_path / "saved"), Indices(), tmp_path / "saved"
    data = np.ones((24, 4), np.float32), np.zeros((24, 1), np.float32)
    for callback, resume in ((first, False), (rest, path)):
        trainer = Trainer(nn.Linear(4, 1), optim.SGD(0.1), "mse", batch_size=4, seed=0)
        trainer.fit(data, epochs=2, callbacks=callback, resume=resume, verbose=0)
    assert first.seen == [*range(6)] * 2
    assert rest.seen == [3, 4, 5, *range(6)]
