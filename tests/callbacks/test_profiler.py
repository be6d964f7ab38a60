"""Profiler, against times that the tests put in."""

import json
import time

import mlx.core as mx
import pytest
from toys import Do, Recorder, raising, ramp, trainer_of

from mlx_fit import Callback, ConfigurationError, ModelCheckpoint, Profiler
from mlx_fit.callbacks.profiler import PHASES


def sleeping(seconds):
    return lambda *_: time.sleep(seconds)


def slow(batches, seconds):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def fit(profiler, *others, data=None, **options):
    options = {"callbacks": [profiler, *others], "verbose": 0} | options
    return trainer_of(metrics=[]).fit(ramp(5) if data is None else data, **options)


def test_each_second_goes_to_its_phase(tmp_path):
    profiler = Profiler(prints=False)

    class Sleeps(Callback):
        def on_train_batch_end(self, batch, logs):
            time.sleep(0.01)

        def on_test_batch_end(self, batch, logs):
            time.sleep(0.02)

    start = time.perf_counter()
    saves = ModelCheckpoint(tmp_path / "w.safetensors")
    fit(profiler, Sleeps(), saves, data=lambda: slow(ramp(5), 0.03), val=ramp(2))
    whole, seconds = time.perf_counter() - start, profiler.seconds
    assert 0.15 <= seconds["data wait"] < whole - 0.09
    assert 0.09 <= seconds["callbacks"] < whole - 0.15
    assert seconds["evaluation"] > 0
    assert seconds["checkpoints"] > 0
    assert sum(seconds.values()) <= whole
    assert profiler.counts["step"] == 5
    assert profiler.counts["data wait"] == 5
    assert 0.05 <= profiler.hooks["Sleeps.on_train_batch_end"] < seconds["callbacks"] - 0.03


def test_a_slow_step_is_the_steps_and_a_slow_evaluation_the_evaluations():
    def loss(outputs, targets):
        time.sleep(0.05)  # while it is traced
        return mx.square(outputs - targets)

    profiler = Profiler(prints=False)
    trainer_of(loss=loss, metrics=[]).fit(ramp(3), ramp(1), callbacks=profiler, verbose=0)
    assert profiler.seconds["step"] > 0.05
    assert profiler.seconds["evaluation"] > 0.05
    assert profiler.seconds["data wait"] < 0.05
    assert profiler._longest["step"] > 0.05


def test_evaluations_inside_epochs_are_no_wait_for_data():
    profiler = Profiler(prints=False)
    options = {"val": lambda: slow(ramp(1), 0.03), "validation_freq": "1 steps"}
    fit(profiler, **options)
    assert profiler.seconds["evaluation"] > 0.14
    assert profiler.seconds["data wait"] < 0.05
    assert profiler.counts["data wait"] == 5


def test_it_needs_no_other_callback_and_leaves_their_order_alone():
    with_it, without = Recorder(), Recorder()
    fit(Profiler(prints=False), with_it, val=ramp(2), epochs=2)
    trainer_of().fit(ramp(5), ramp(2), epochs=2, callbacks=without, verbose=0)
    assert with_it.events == without.events


def test_the_table_is_printed_and_can_be_asked_for(capsys):
    profiler = Profiler()
    with pytest.raises(ConfigurationError, match="nothing was measured yet"):
        profiler.table()
    fit(profiler, Do("on_epoch_end", sleeping(0.01)))
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == profiler.table()
    first_words = [line.strip().split("  ")[0] for line in printed.splitlines()]
    assert first_words[:7] == ["phase", *PHASES]
    assert "Do.on_epoch_end" in first_words
    assert all(len(line) <= 80 for line in printed.splitlines())
    fit(Profiler(prints=False))
    assert capsys.readouterr().out == ""


def test_the_trace_is_chromes(tmp_path):
    path = tmp_path / "a" / "trace.json"
    fit(Profiler(path, prints=False), Do("on_epoch_end", sleeping(0.01)), val=ramp(1))
    events = json.loads(path.read_text())["traceEvents"]
    assert {"step", "data wait", "evaluation", "callbacks"} <= {event["cat"] for event in events}
    assert all(event["ph"] == "X" and event["ts"] >= 0 and event["dur"] > 0 for event in events)
    ends = [event["ts"] + event["dur"] for event in events]
    starts = [event["ts"] for event in events]
    assert all(end <= start + 1 for end, start in zip(ends, starts[1:], strict=False))
    (hook,) = [event for event in events if event["name"] == "Do.on_epoch_end"]
    assert hook["dur"] > 1e4


def test_events_are_kept_up_to_a_number(tmp_path):
    path = tmp_path / "trace.json"
    profiler = Profiler(path, prints=False, max_events=3)
    fit(profiler)
    assert len(json.loads(path.read_text())["traceEvents"]) == 3
    assert profiler.counts["step"] == 5


def test_after_an_error_the_trace_is_there(tmp_path):
    path = tmp_path / "trace.json"
    with pytest.raises(OSError, match="x"):
        fit(Profiler(path), Do("on_epoch_end", raising(OSError("x"))))
    assert json.loads(path.read_text())["traceEvents"]


def test_a_new_fit_is_measured_anew_and_evaluate_is_not():
    profiler = Profiler(prints=False)
    for _ in range(2):
        fit(profiler)
        assert profiler.counts["step"] == 5
    trainer_of().evaluate(ramp(2), callbacks=profiler, verbose=0)
    assert profiler.counts["evaluation"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [({"trace": 3}, "trace=3"), ({"prints": "no"}, "prints="), ({"max_events": -1}, "max_events=")],
)
def test_a_wrong_argument_is_named(options, says):
    with pytest.raises(ConfigurationError, match=f"Profiler: {says}"):
        Profiler(**options)


def test_what_callbacks_do_while_another_saves_is_counted_once(tmp_path):
    profiler = Profiler(prints=False)
    told = Do("on_save_begin", sleeping(0.1))
    start = time.perf_counter()
    fit(profiler, told, ModelCheckpoint(tmp_path / "w.safetensors"), data=ramp(2))
    assert sum(profiler.seconds.values()) <= time.perf_counter() - start
    assert profiler.seconds["checkpoints"] > 0.1
    assert "Do.on_save_begin" not in profiler.hooks


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path):
    with pytest.raises(ConfigurationError, match="is a folder"):
        Profiler(tmp_path)
    (tmp_path / "file").touch()
    profiler = Profiler(tmp_path / "file" / "trace.json", prints=False)
    with pytest.warns(UserWarning, match="could not write its trace"):
        assert fit(profiler).epoch == [0]
