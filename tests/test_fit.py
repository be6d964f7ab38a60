"""The semantics of ``Trainer.fit``; numbers worked out by hand or measured on Keras."""

import itertools
import os
import signal
import threading
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import (
    Do,
    Ones,
    Recorder,
    batch_of,
    raising,
    ramp,
    rows_of_ones,
    scripted,
    still_trainer,
    stop,
    trainer_of,
    weight_of,
)

from mlx_fit import (
    ConfigurationError,
    DataError,
    EarlyStopping,
    LambdaCallback,
    NonFiniteLossError,
    TerminateOnNaN,
    Trainer,
)
from mlx_fit.metrics import Mean


def fit(trainer, train, val=None, **options):
    return trainer.fit(train, val, **({"verbose": 0} | options))


def endless():
    return (batch_of(1) for _ in itertools.count())


# --- epochs, logs, history -----------------------------------------------------------------------


def test_history_has_a_float_per_epoch_and_key():
    history = fit(trainer_of(), rows_of_ones(), rows_of_ones(), epochs=3)
    assert set(history.history) == {"loss", "mae", "val_loss", "val_mae", "learning_rate"}
    assert all(len(v) == 3 and {type(x) for x in v} == {float} for v in history.history.values())
    assert history.epoch == [0, 1, 2]
    assert history.params == {"verbose": 0, "epochs": 3, "steps": 3}


def test_updates_follow_the_worked_out_example():
    losses, trainer = [], trainer_of()
    watcher = LambdaCallback(on_train_batch_end=lambda _, logs: losses.append(logs.batch["loss"]))
    fit(trainer, [batch_of(1)] * 3, callbacks=watcher)
    assert losses == pytest.approx([16.0, 15.158046, 14.360396], rel=1e-6)
    assert weight_of(trainer) == pytest.approx(0.922114, rel=1e-6)


def test_the_order_of_hooks_is_that_of_keras():
    recorder = Recorder()
    fit(trainer_of(), rows_of_ones(), rows_of_ones(4), callbacks=recorder)
    batches = [(f"train_batch_{end}", i) for i in range(3) for end in ("begin", "end")]
    assert recorder.events == [
        ("train_begin",),
        ("epoch_begin", 0),
        *batches,
        ("test_begin",),
        ("test_batch_begin", 0),
        ("test_batch_end", 0),
        ("test_end",),
        ("validation_end",),
        ("epoch_end", 0),
        ("train_end",),
    ]


def test_batch_logs_are_running_means():
    seen = []
    watcher = LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(logs["loss"]))
    history = fit(still_trainer(), ramp(), callbacks=watcher)
    assert seen == pytest.approx([0, 8, 80 / 3, 56])
    assert history.history["loss"] == [56.0]


def test_the_epoch_loss_weighs_batches_by_rows():
    x = np.repeat(np.arange(1, 11, dtype=np.float32)[:, None], 4, axis=1)
    history = fit(still_trainer(), (x, np.zeros((10, 3), np.float32)), shuffle=False)
    assert history.history["loss"] == [616.0]


def test_sums_start_anew_each_epoch_and_ignore_validation():
    history = fit(still_trainer(), ramp(2), ramp(4), epochs=2)
    assert history.history["loss"] == [8.0, 8.0]
    assert history.history["val_loss"] == [56.0, 56.0]


def test_epochs_is_the_index_after_the_last():
    history = fit(trainer_of(), rows_of_ones(), epochs=6, initial_epoch=3)
    assert history.epoch == [3, 4, 5]


@pytest.mark.parametrize(("epochs", "initial_epoch"), [(3, 3), (2, 5), (0, 0)])
def test_nothing_left_to_do_is_an_empty_history(epochs, initial_epoch):
    recorder = Recorder()
    options = {"epochs": epochs, "initial_epoch": initial_epoch, "callbacks": recorder}
    assert fit(trainer_of(), rows_of_ones(), **options).history == {}
    assert recorder.names == ["train_begin", "train_end"]


def test_a_second_fit_goes_on_with_a_new_history():
    trainer = Trainer(Ones(), optim.Adam(0.01), "mse")
    first = fit(trainer, [batch_of(1)])
    second = fit(trainer, [batch_of(1)])
    assert trainer.optimizer.step.item() == 2
    assert (first.epoch, second.epoch) == ([0], [0])
    assert trainer.history is second
    assert trainer.step == 2


def test_two_fits_equal_one_longer_fit():
    def trained(*stretches):
        trainer = trainer_of(
            nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), seed=1
        )
        mx.random.seed(0)
        trainer.model.apply(lambda p: mx.full(p.shape, 0.1))
        x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
        for start, end in stretches:
            fit(trainer, (x, x[:, :3]), initial_epoch=start, epochs=end)
        return trainer.model.layers[0].weight

    assert mx.array_equal(trained((0, 2), (2, 4)), trained((0, 4)))


def test_a_seed_fixes_the_run_and_shuffling_changes_each_epoch():
    def orders(seed):
        seen = []
        watch = LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(logs.batch["loss"]))
        x = np.repeat(np.arange(12, dtype=np.float32)[:, None], 4, axis=1)
        fit(still_trainer(seed=seed), (x, np.zeros((12, 3), np.float32)), epochs=2, callbacks=watch)
        return seen

    assert orders(3) == orders(3) != orders(4)
    assert orders(3)[:3] != orders(3)[3:]


def test_shuffle_false_keeps_the_order():
    seen = []
    watch = LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(logs.batch["loss"]))
    x = np.repeat(np.arange(3, dtype=np.float32)[:, None], 4, axis=1)
    y = np.zeros((3, 3), np.float32)
    fit(still_trainer(batch_size=1), (x, y), epochs=2, shuffle=False, callbacks=watch)
    assert seen == [0, 16, 64] * 2


def test_callbacks_see_the_state_after_the_batch():
    trainer, seen = trainer_of(), []
    fit(trainer, ramp(3), callbacks=Do("on_train_batch_end", lambda run: seen.append(run.step)))
    assert seen == [1, 2, 3]


def test_keys_that_callbacks_add_are_shared_and_kept():
    seen = []
    adds = LambdaCallback(on_epoch_end=lambda _, logs: logs.update(extra=mx.array(2.0)))
    reads = LambdaCallback(on_epoch_end=lambda _, logs: seen.append(logs["extra"].item()))
    history = fit(trainer_of(), ramp(), callbacks=[adds, reads])
    assert seen == [2.0]
    assert history.history["extra"] == [2.0]
    assert type(history.history["extra"][0]) is float


def test_begin_hooks_get_an_empty_mapping_and_train_end_the_last_logs():
    seen = {}
    fit(
        trainer_of(),
        ramp(),
        callbacks=LambdaCallback(
            on_train_begin=lambda logs: seen.update(begin=dict(logs)),
            on_epoch_begin=lambda _, logs: seen.update(epoch=dict(logs)),
            on_train_end=lambda logs: seen.update(end=dict(logs)),
        ),
    )
    assert seen["begin"] == seen["epoch"] == {}
    assert set(seen["end"]) == {"loss", "mae", "learning_rate"}


def test_callbacks_may_be_nested_or_alone():
    first, second = Recorder(), Recorder()
    fit(trainer_of(), ramp(), callbacks=[[first], [None, (second,)]])
    assert first.events == second.events != []


def test_train_does_what_fit_does(capsys):
    recorder = Recorder()
    trainer = trainer_of()
    history = trainer.train(rows_of_ones(), rows_of_ones(), 2, callbacks=recorder)
    assert history.epoch == [0, 1]
    assert "val_loss" in history.history
    assert recorder.names.count("epoch_end") == 2


def test_steps_have_rows_every_log_every_steps():
    history = fit(still_trainer(), ramp(4), epochs=2, log_every=2)
    rows = [(row["step"], row["epoch"], row["loss"]) for row in history.steps]
    assert rows == [(2, 0, 8.0), (4, 0, 104.0), (6, 1, 8.0), (8, 1, 104.0)]


def test_steps_end_with_what_is_left_of_an_epoch():
    history = fit(still_trainer(), ramp(4), log_every=3)
    assert [row["step"] for row in history.steps] == [3, 4]
    assert history.steps[1]["loss"] == 144.0


def test_a_row_that_was_due_where_a_run_stopped_has_the_metrics_of_then(tmp_path):
    failing = Do("on_train_batch_end", raising(KeyError("the hook")), 3)
    with pytest.raises(KeyError):
        fit(still_trainer(), ramp(6), log_every=2, checkpoint_dir=tmp_path, callbacks=failing)
    other = still_trainer(metrics=["mse", "mae"])
    with pytest.warns(UserWarning, match="metrics was"):
        history = fit(other, ramp(6), log_every=2, checkpoint_dir=tmp_path, resume=True)
    assert history.steps[1] == {"step": 4, "epoch": 0, "loss": 104.0, "mae": 10.0}


class Broken(Mean):
    def compute(self, state):
        raise ValueError("the metric")


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        (raising(KeyError("the hook")), KeyError),
        (lambda _: os.kill(os.getpid(), signal.SIGINT), ValueError),
    ],
    ids=["hook", "signal"],
)
def test_a_metric_that_raises_is_heard_of_unless_another_error_has_ended_the_fit(ends, error):
    trainer = trainer_of(metrics=[Broken(lambda outputs, _: outputs[:, 0], "broken")])
    with pytest.raises(error, match="the "):
        fit(trainer, ramp(4), log_every=1, callbacks=Do("on_train_batch_end", ends, 2))


# --- stopping ------------------------------------------------------------------------------------


def test_a_stop_at_a_batch_still_validates_and_ends_the_epoch():
    recorder = Recorder()
    stopper = Do("on_train_batch_end", stop, index=1)
    options = {"epochs": 5, "callbacks": [stopper, recorder]}
    history = fit(trainer_of(), ramp(5), ramp(1), **options)
    assert [e for e in recorder.events if e[0] == "train_batch_end"] == [
        ("train_batch_end", 0),
        ("train_batch_end", 1),
    ]
    assert recorder.names[-6:] == ["test_batch_begin", "test_batch_end"] + [
        "test_end",
        "validation_end",
        "epoch_end",
        "train_end",
    ]
    assert history.epoch == [0]
    assert "val_loss" in history.history


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin"])
def test_a_stop_before_the_first_batch_runs_just_one(hook):
    recorder = Recorder()
    fit(trainer_of(), ramp(5), epochs=3, callbacks=[Do(hook, stop), recorder])
    assert recorder.names.count("train_batch_end") == 1
    assert recorder.names[-2:] == ["epoch_end", "train_end"]


def test_a_stop_flag_ends_an_endless_iterator():
    data = endless()
    trainer = trainer_of()
    fit(trainer, data, epochs=9, callbacks=Do("on_train_batch_end", stop, index=4))
    assert trainer.step == 5


def test_request_stop_records_its_reason():
    stopper = Do("on_train_batch_end", lambda run: run.request_stop("enough"), index=1)
    assert fit(trainer_of(), ramp(), callbacks=stopper).stopped_by == "enough"


def test_a_stop_does_not_reach_the_next_fit():
    trainer = trainer_of()
    fit(trainer, ramp(), callbacks=Do("on_train_begin", stop))
    assert len(fit(trainer, ramp(), epochs=2).epoch) == 2


@pytest.mark.parametrize(
    ("max_steps", "epochs", "steps_taken", "rows"),
    [(5, 9, 5, 2), (4, 9, 4, 1), (100, 2, 8, 2), (1, 1, 1, 1)],
)
def test_max_steps_or_epochs_whichever_comes_first(max_steps, epochs, steps_taken, rows):
    trainer = trainer_of()
    history = fit(trainer, ramp(4), ramp(1), epochs=epochs, max_steps=max_steps)
    assert trainer.step == steps_taken
    assert len(history.epoch) == len(history.evaluations) == rows
    assert history.stopped_by == (None if max_steps == 100 else "max_steps")


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 20), (2, 10), (3, 7)])
def test_updates_are_counted_by_window(accumulation, updates):
    trainer = trainer_of(gradient_accumulation=accumulation)
    fit(trainer, [batch_of(1)] * 20)
    assert trainer.step == trainer.optimizer.step.item() == updates


@pytest.mark.parametrize("wrap", [list, iter], ids=["length known", "length unknown"])
def test_a_short_window_is_flushed_and_max_steps_is_not_exceeded(wrap):
    trainer = trainer_of(gradient_accumulation=3)
    fit(trainer, wrap([batch_of(1)] * 4), epochs=1, max_steps=5)
    assert trainer.step == 2
    trainer = trainer_of(gradient_accumulation=3)
    fit(trainer, wrap([batch_of(1)] * 8), epochs=1, max_steps=2)
    assert trainer.optimizer.step.item() == 2


@pytest.mark.parametrize("wrap", [list, iter], ids=["length known", "length unknown"])
def test_accumulation_gives_the_weights_of_the_big_batch(wrap):
    x = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    y = x[:, :3]
    small, big = trainer_of(gradient_accumulation=3), trainer_of()
    fit(small, wrap([(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 6), (6, 7), (7, 10))]))
    fit(big, [(x[:7], y[:7]), (x[7:], y[7:])])
    assert mx.allclose(small.model.weight, big.model.weight, rtol=1e-6)


def test_validation_inside_a_window_keeps_its_gradients():
    plain, watched = (trainer_of(gradient_accumulation=3) for _ in range(2))
    fit(plain, ramp(6))
    evaluates = LambdaCallback(
        on_train_batch_end=lambda *_: watched.evaluate(rows_of_ones(), verbose=0)
    )
    fit(watched, ramp(6), callbacks=evaluates)
    assert mx.array_equal(plain.model.weight, watched.model.weight)


def test_a_schedule_follows_updates_not_batches():
    seen = []
    optimizer = optim.SGD(optim.linear_schedule(1.0, 0.0, 10))
    trainer = Trainer(Ones(), optimizer, "mse", gradient_accumulation=2)
    watch = Do("on_train_batch_end", lambda run: seen.append(run.learning_rate))
    fit(trainer, [batch_of(0)] * 22, callbacks=watch)
    assert seen[19] == pytest.approx(0.1)
    assert seen[21] == 0.0


# --- data ----------------------------------------------------------------------------------------


def test_steps_per_epoch_joins_passes():
    history = fit(still_trainer(), ramp(10), epochs=5, steps_per_epoch=4)
    losses = [np.mean([16.0 * (i % 10) ** 2 for i in range(4 * e, 4 * e + 4)]) for e in range(5)]
    assert history.history["loss"] == losses
    assert losses[:2] == [56.0, 504.0]


def test_nothing_of_an_iterator_is_lost_to_looking_ahead():
    data = iter(ramp(10))
    history = fit(still_trainer(), data, epochs=2, steps_per_epoch=4)
    assert history.history["loss"] == [56.0, 504.0]
    assert len(list(data)) == 2


def test_an_iterator_that_ends_early_raises():
    with pytest.raises(DataError, match="ran out"):
        fit(trainer_of(), iter(ramp(5)), epochs=3)
    with pytest.raises(DataError, match="after 1 of 3 steps"):
        fit(trainer_of(), iter(ramp(4)), epochs=2, steps_per_epoch=3)


def test_a_function_gives_each_epoch_its_iterator():
    history = fit(still_trainer(), lambda: iter(ramp(4)), epochs=3)
    assert history.history["loss"] == [56.0] * 3


def test_endless_data_train_and_validate_by_steps():
    recorder = Recorder()
    options = {"steps_per_epoch": 3, "validation_steps": 4, "callbacks": recorder}
    fit(trainer_of(), endless(), endless(), **options)
    assert recorder.names.count("train_batch_end") == 3
    assert recorder.names.count("test_batch_end") == 4


def test_empty_data_is_an_error_before_training():
    recorder = Recorder()
    for data in ([], iter([]), (np.zeros((0, 4)), np.zeros((0, 3)))):
        with pytest.raises(DataError):
            fit(trainer_of(), data, callbacks=recorder)
    assert "train_batch_end" not in recorder.names


def test_an_error_in_the_data_reaches_the_caller():
    def data():
        yield batch_of(1)
        raise OSError("the disk went away")

    recorder = Recorder()
    with pytest.raises(OSError, match=r"^the disk went away$"):
        fit(trainer_of(), data(), callbacks=recorder)
    assert recorder.names[-1] == "exception"


def test_float64_becomes_float32_and_integers_stay():
    seen = {}

    def objective(model, batch):
        seen.update(x=batch[0].dtype, y=batch[1].dtype)
        return model(batch[0]).mean()

    trainer = Trainer(Ones(), optim.SGD(0.1), objective=objective)
    fit(trainer, (np.ones((4, 4)), np.zeros(4, np.int32)))
    assert seen == {"x": mx.float32, "y": mx.int32}


def test_a_dataset_of_rows_is_batched_here():
    class Rows:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return np.full(4, index, np.float32), np.zeros(3, np.float32)

    recorder = Recorder()
    history = fit(still_trainer(), Rows(), callbacks=recorder)
    assert recorder.names.count("train_batch_end") == 3
    assert history.history["loss"] == [np.mean([16.0 * i**2 for i in range(10)])]


def test_torch_datasets_and_loaders_train():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(a) for a in rows_of_ones())
    dataset = torch.utils.data.TensorDataset(x, y)
    expected = fit(trainer_of(), rows_of_ones(), epochs=2).history["loss"]
    for data in (dataset, torch.utils.data.DataLoader(dataset, batch_size=4), (x, y)):
        trainer = trainer_of()
        assert fit(trainer, data, epochs=2).history["loss"] == pytest.approx(expected)


def test_validation_split_takes_the_last_rows_with_their_weights():
    x, y = rows_of_ones()
    weights = np.repeat(np.float32([1, 0]), [8, 2])
    x[8:] = 5
    with pytest.warns(UserWarning, match="sum to 0"):
        history = fit(still_trainer(), (x, y, weights), validation_split=0.2)
    assert history.history["loss"] == [16.0]
    history = fit(still_trainer(), (x, y), validation_split=0.2)
    assert (history.history["loss"], history.history["val_loss"]) == ([16.0], [400.0])


def test_validation_data_wins_over_the_split():
    recorder = Recorder()
    options = {"validation_split": 0.5, "callbacks": recorder}
    fit(trainer_of(), rows_of_ones(12), rows_of_ones(4), **options)
    assert recorder.names.count("train_batch_end") == 3
    assert recorder.names.count("test_batch_end") == 1


def test_class_weights_act_on_training_alone():
    def loss(outputs, targets):  # the class only picks the weight
        return outputs.square().mean(-1)

    x, labels = rows_of_ones(4)[0], np.array([0, 0, 1, 1])
    x[2:] = 2
    trainer = still_trainer(loss=loss, metrics=[])
    weights = {0: 3.0}
    history = fit(trainer, (x, labels), (x, labels), class_weight=weights)
    assert history.history["loss"] == [(3 * 16 * 2 + 64 * 2) / 8]
    assert history.history["val_loss"] == [40.0]


# --- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frequency", "evaluated"),
    [(1, [4, 5, 6]), (2, [4, 6]), (5, [5]), ([1, 4], [4]), ([6], [6])],
)
def test_validation_freq_counts_absolute_epochs_from_one(frequency, evaluated):
    options = {"epochs": 6, "initial_epoch": 3, "validation_freq": frequency}
    history = fit(trainer_of(), ramp(1), ramp(1), **options)
    assert [row["epoch"] + 1 for row in history.evaluations] == evaluated
    assert len(history.history.get("val_loss", [])) == len(evaluated)
    assert len(history.history["loss"]) == 3


def test_validation_by_steps_keeps_every_evaluation_and_the_epoch_the_last():
    history = fit(trainer_of(), ramp(5), ramp(2), epochs=2, validation_freq="2 steps")
    assert [(row["step"], row["epoch"]) for row in history.evaluations] == [
        (2, 0),
        (4, 0),
        (6, 1),
        (8, 1),
        (10, 1),
    ]
    last = [history.evaluations[1]["val_loss"], history.evaluations[4]["val_loss"]]
    assert history.history["val_loss"] == last


def test_validation_at_the_last_step_is_not_repeated():
    history = fit(trainer_of(), ramp(10), ramp(2), validation_freq="5 steps")
    assert [row["step"] for row in history.evaluations] == [5, 10]


def test_several_validation_sets_have_their_own_keys():
    history = fit(still_trainer(), ramp(4), {"low": ramp(2), "high": ramp(4)})
    assert history.history["val_low_loss"] == [8.0]
    assert history.history["val_high_loss"] == [56.0]
    assert "val_loss" not in history.history


def test_validation_steps_restart_from_the_top():
    history = fit(still_trainer(), ramp(), ramp(), epochs=3, validation_steps=2)
    assert history.history["val_loss"] == [8.0] * 3


def test_validation_from_an_iterator_is_kept_for_later_epochs():
    history = fit(still_trainer(), ramp(), iter(ramp()), epochs=3)
    assert history.history["val_loss"] == [56.0] * 3


def test_validation_does_not_perturb_training():
    def trained(val, **options):
        mx.random.seed(7)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        trainer = trainer_of(model, seed=0)
        fit(trainer, rows_of_ones(), val, epochs=2, **options)
        return model.layers[0].weight

    plain = trained(None)
    assert mx.array_equal(plain, trained(rows_of_ones()))
    assert mx.array_equal(plain, trained(rows_of_ones(), validation_freq="1 step"))


class Modes(nn.Module):
    """The identity in training, zeros in evaluation."""

    def __init__(self):
        super().__init__()
        self.scale = mx.ones((1,))

    def __call__(self, x):
        return x * self.scale * (1.0 if self.training else 0.0)


def test_validation_runs_in_evaluation_mode_and_training_mode_returns():
    ones = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    trainer = still_trainer(model=Modes())
    history = fit(trainer, [ones], [ones], epochs=2)
    assert history.history["loss"] == [1.0, 1.0]
    assert history.history["val_loss"] == [0.0, 0.0]
    assert trainer.evaluate([ones], verbose=0)["loss"] == 0.0
    assert not trainer.predict(ones[0], verbose=0).any()
    assert trainer.model.training


def test_a_model_in_evaluation_mode_is_trained_and_put_back():
    model = Modes()
    model.eval()
    ones = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    assert fit(still_trainer(model=model), [ones]).history["loss"] == [1.0]
    assert not model.training


def test_modules_the_user_put_into_evaluation_mode_stay_there():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.layers[1].eval()
    seen = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: seen.append(model.layers[1].training))
    fit(trainer_of(model), rows_of_ones(), rows_of_ones(), epochs=2, callbacks=watch)
    assert set(seen) == {False}
    assert (model.training, model.layers[1].training) == (True, False)


# --- weights of zero -----------------------------------------------------------------------------


def test_an_epoch_of_total_weight_zero_changes_nothing_and_says_so():
    trainer = trainer_of()
    history = fit(trainer, (*rows_of_ones(), np.zeros(10, np.float32)))
    assert weight_of(trainer) == 1.0
    assert history.history["skipped_updates"] == [3.0]
    assert "loss" not in history.history


def test_rows_of_weight_zero_do_not_count():
    x, y = rows_of_ones()
    x[5:] = 9
    weights = np.repeat(np.float32([2, 0]), 5)
    history = fit(still_trainer(), (x, y, weights), (x, y, weights))
    assert (history.history["loss"], history.history["val_loss"]) == ([16.0], [16.0])


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory, says me"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "hook",
    ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"]
    + ["on_test_begin", "on_test_batch_end", "on_validation_end", "on_epoch_end", "on_train_end"],
)
def test_an_exception_in_a_callback_propagates_unchanged(hook, error):
    before, after = Recorder(), Recorder()
    with pytest.raises(type(error)) as caught:
        fit(
            trainer_of(),
            ramp(),
            ramp(),
            callbacks=[before, Do(hook, raising(error)), after],
        )
    assert caught.value is error
    assert before.names[-1] == after.names[-1] == "exception"
    assert ("train_end" in before.names) == (hook == "on_train_end")
    assert "train_end" not in after.names


def test_training_goes_on_after_an_exception():
    trainer, plain = trainer_of(), trainer_of()
    with pytest.raises(RuntimeError):
        fit(trainer, ramp(2), callbacks=Do("on_epoch_end", raising(RuntimeError())))
    for run in (trainer, plain):
        fit(run, ramp(2))
    fit(plain, ramp(2))
    assert mx.array_equal(trainer.model.weight, plain.model.weight)


def test_a_bug_in_the_loss_names_the_batch_and_leaves_everything_whole():
    trainer, plain = trainer_of(), trainer_of()
    with pytest.raises(ValueError, match="shape") as caught:
        fit(trainer, [(np.ones((2, 5), np.float32), np.ones((2, 3), np.float32))])
    assert "x: (2, 5) float32" in str(caught.value.__notes__)
    fit(trainer, ramp(3))
    fit(plain, ramp(3))
    assert mx.array_equal(trainer.model.weight, plain.model.weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_no_number_raises_with_its_step(bad):
    recorder = Recorder()
    data = [batch_of(1), batch_of(1), batch_of(bad), batch_of(1)]
    with pytest.raises(NonFiniteLossError, match="at step 3") as caught:
        fit(trainer_of(), data, log_every=1, callbacks=recorder)
    assert (caught.value.step, caught.value.epoch) == (3, 0)
    assert "train_end" not in recorder.names


def test_the_first_bad_step_is_named_however_late_it_is_seen():
    data = [batch_of(1), batch_of(np.nan), *[batch_of(1)] * 6]
    with pytest.raises(NonFiniteLossError) as caught:
        fit(trainer_of(), data, log_every=100)
    assert caught.value.step == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_terminate_on_nan_ends_quietly(bad):
    data = [batch_of(1), batch_of(1), batch_of(bad), batch_of(1), batch_of(1)]
    trainer, recorder = trainer_of(), Recorder()
    history = fit(trainer, data, epochs=3, callbacks=[TerminateOnNaN(), recorder])
    assert history.stopped_by == "TerminateOnNaN"
    assert history.epoch == [0]
    assert trainer.step == 3
    assert recorder.names[-2:] == ["epoch_end", "train_end"]


def test_without_terminate_on_nan_the_next_fit_raises_again():
    trainer = trainer_of()
    fit(trainer, [batch_of(np.nan)], callbacks=TerminateOnNaN())
    with pytest.raises(NonFiniteLossError):
        fit(trainer, [batch_of(1)])


def test_early_stopping_ends_the_fit_and_is_recorded():
    callbacks = [scripted("val_loss", [1.0, 2.0, 3.0]), EarlyStopping()]
    history = fit(trainer_of(), ramp(1), ramp(1), epochs=3, callbacks=callbacks)
    assert history.epoch == [0, 1]
    assert history.stopped_by == "EarlyStopping"


# --- nested calls --------------------------------------------------------------------------------


def test_evaluating_in_a_callback_leaves_the_run_as_it_was(capsys):
    infos = []

    def look(run):
        before = run.info
        run.evaluate(rows_of_ones(), verbose=0)
        run.predict(rows_of_ones(), verbose=0)
        infos.append(run.info is before)

    fit(trainer_of(), ramp(), ramp(), epochs=2, verbose=2, callbacks=Do("on_epoch_end", look))
    assert infos == [True, True]
    assert "Epoch 2/2" in capsys.readouterr().out


def test_a_failing_evaluation_in_a_callback_does_not_stop_the_count():
    def look(run):
        with pytest.raises(ValueError, match="shape"):
            run.evaluate((np.ones((4, 5)), np.ones((4, 3))), verbose=0)

    trainer = trainer_of()
    fit(trainer, ramp(3), epochs=2, callbacks=Do("on_epoch_end", look))
    assert trainer.step == 6


# --- threads -------------------------------------------------------------------------------------


def in_thread(function):
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def test_fit_works_in_a_thread_with_a_model_from_the_main_thread():
    trainer = trainer_of(nn.Linear(4, 3), seed=0)
    history = in_thread(lambda: fit(trainer, rows_of_ones(), rows_of_ones(), epochs=2))
    assert len(history.history["val_loss"]) == 2
    assert len(fit(trainer, rows_of_ones()).epoch) == 1


def test_evaluating_in_a_thread_after_training_in_the_main_thread():
    trainer = trainer_of(nn.Linear(4, 3))
    fit(trainer, rows_of_ones())
    here = trainer.evaluate(rows_of_ones(), verbose=0)
    assert in_thread(lambda: trainer.evaluate(rows_of_ones(), verbose=0)) == here


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": "3"}, "epochs='3'"),
        ({"epochs": -1}, "epochs=-1"),
        ({"initial_epoch": 1.5}, "initial_epoch=1.5"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"validation_steps": True}, "validation_steps=True"),
        ({"log_every": 0}, "log_every=0"),
        ({"validation_freq": (1, 4)}, r"validation_freq=\(1, 4\); expected a positive int"),
        ({"validation_freq": 0}, '"500 steps"'),
        ({"validation_freq": []}, r"validation_freq=\[\]"),
        ({"validation_freq": "0 steps"}, "validation_freq='0 steps'"),
        ({"validation_freq": "5 epochs"}, "validation_freq='5 epochs'"),
        ({"validation_split": 1.0}, "validation_split=1.0"),
        ({"validation_split": "0.2"}, "validation_split='0.2'"),
        ({"verbose": 3}, "verbose=3; expected 0, 1, 2 or 'auto'"),
        ({"shuffle": "batch"}, "shuffle='batch'"),
        ({"class_weight": [1, 2]}, "class_weight is a list"),
        ({"callbacks": [EarlyStopping]}, r"A class needs \(\)"),
        ({"callbacks": [print]}, "LambdaCallback"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_expected(options, says):
    with pytest.raises(ConfigurationError, match=says):
        fit(trainer_of(), rows_of_ones(), rows_of_ones(), **options)


def test_two_bare_arrays_are_refused_with_the_right_way():
    with pytest.raises(ConfigurationError, match=r"fit\(\(x, y\)\)"):
        trainer_of().fit(*rows_of_ones())


@pytest.mark.parametrize("data", [None, 3, "data.csv", Ones])
def test_data_that_is_none_says_what_is_accepted(data):
    with pytest.raises(DataError, match=r"a tuple \(x, y\)"):
        fit(trainer_of(), data)
    with pytest.raises(DataError, match="val is"):
        fit(trainer_of(), ramp(), "val" if data is None else data)


def test_a_validation_split_of_batches_is_refused():
    for data in (ramp(), iter(ramp())):
        with pytest.raises(DataError, match="Pass the validation data as val"):
            fit(trainer_of(), data, validation_split=0.2)


def test_wrong_arguments_leave_the_modes_alone():
    trainer = trainer_of()
    trainer.model.eval()
    with pytest.raises(ConfigurationError):
        fit(trainer, ramp(), epochs=-1)
    assert not trainer.model.training


def test_a_skipped_batch_has_no_values_of_its_own():
    batch = LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(logs.batch.get("loss")))
    seen = []
    x = np.ones((2, 4), np.float32)
    ignored, counted = (x, np.array([-100, -100])), (x, np.array([0, 1]))
    trainer = Trainer(nn.Linear(4, 3), optim.SGD(0.1), "cross_entropy")
    trainer.fit([counted, ignored, counted], callbacks=batch, verbose=0)
    assert [value is None for value in seen] == [False, True, False]


def test_an_evaluation_inside_validation_leaves_its_sums_alone():
    data = ramp(4)
    trainer = still_trainer()

    def evaluate_again(batch, logs):
        if batch == 1 and trainer.info.kind == "fit":
            trainer.evaluate(ramp(2), verbose=0)

    again = LambdaCallback(on_test_batch_end=evaluate_again)
    history = trainer.fit(data, data, callbacks=again, verbose=0)
    assert history.history["val_loss"] == [56]


def test_an_interrupted_validation_keeps_the_row_of_its_epoch():
    interrupt = LambdaCallback(on_test_batch_end=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    history = trainer_of().fit(
        rows_of_ones(), rows_of_ones(), epochs=3, callbacks=interrupt, verbose=0
    )
    assert (history.epoch, history.stopped_by) == ([0], "SIGINT")
    assert "loss" in history.history
    assert "val_loss" not in history.history


def test_negative_weights_are_refused_by_row():
    x, y = rows_of_ones()
    with pytest.raises(DataError, match="row 1 of the batch are -1"):
        trainer_of().fit([(x, y, np.array([1.0, -1.0] + [1.0] * (len(x) - 2)))], verbose=0)


class Pair(NamedTuple):
    x: np.ndarray
    y: np.ndarray


@pytest.mark.parametrize(
    ("batch", "says"),
    [({"image": np.ones((2, 4))}, "dict with image"), (Pair(np.ones((2, 4)), None), "NamedTuple")],
)
def test_a_batch_without_targets_says_what_it_is(batch, says):
    with pytest.raises(DataError, match=says):
        fit(trainer_of(), [batch])


def test_another_model_is_the_one_that_is_evaluated_and_predicted():
    trainer, x = trainer_of(), np.ones((2, 4), np.float32)
    before = trainer.evaluate(rows_of_ones(), verbose=0)["loss"], trainer.predict(x, verbose=0)
    trainer.model = nn.Linear(4, 3)
    assert trainer.evaluate(rows_of_ones(), verbose=0)["loss"] != before[0]
    assert not np.array_equal(trainer.predict(x, verbose=0), before[1])


@pytest.mark.parametrize("name", ["loss", "learning_rate", "val_loss"])
def test_an_objective_cannot_take_a_name_that_the_trainer_uses(name):
    objective = lambda model, batch: (model(batch[0]).mean(), {name: mx.array(1.0)})  # noqa: E731
    trainer = Trainer(Ones(), optim.SGD(0.1), objective=objective)
    with pytest.raises(ConfigurationError, match=f"{name!r} is a name"):
        fit(trainer, rows_of_ones())


def test_the_learning_rate_of_an_epoch_is_the_one_that_its_last_update_used():
    def change(batch, logs):
        trainer.optimizer.learning_rate = 0.5

    trainer = trainer_of(learning_rate=0.1)
    history = fit(trainer, [batch_of(1)], callbacks=LambdaCallback(on_train_batch_end=change))
    assert history.history["learning_rate"] == pytest.approx([0.1])


def test_a_loss_that_forgets_its_return_is_told_so():
    with pytest.raises(ConfigurationError, match="returned None"):
        trainer_of(loss=lambda outputs, targets: None).fit(rows_of_ones(), verbose=0)
