"""What a run prints: lines, bars, and how seldom they look at values."""

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time
import types

import pytest
from toys import Do, raising, ramp, trainer_of

from mlx_fit import ConfigurationError, LambdaCallback, ModelCheckpoint, TerminateOnNaN
from mlx_fit.callbacks import format, progress
from mlx_fit.callbacks.format import (
    format_seconds,
    format_value,
    format_values,
    summary_line,
)
from mlx_fit.callbacks.progress import Bar, Bars, Lines, resolve_verbose
from mlx_fit.callbacks.screen import Notebook, Screen, in_notebook
from mlx_fit.logs import Values

TESTS = os.path.dirname(os.path.dirname(__file__))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (14.78081, "14.7808"),
        (0.5, "0.5000"),
        (1.2345e-4, "1.2345e-04"),
        (-1.2345e-4, "-1.2345e-04"),
        (1e-3, "1.0000e-03"),
        (1.1e-3, "0.0011"),
        (0.0, "0.0000"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_values_are_formatted_as_keras_does(value, text):
    assert format_value(value).startswith(text)
    assert len(format_value(value)) == len(text) or not text[-1].isdigit()


def test_matrices_are_left_out():
    assert (
        format_values({"loss": 1, "matrix": [[1, 2]], "mae": 0.5}) == "loss: 1.0000 - mae: 0.5000"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (65, "1:05"), (7384, "2:03:04")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_line_has_count_time_and_values():
    line = summary_line(4, 4, 0.984, {"loss": 14.78081, "mae": 3.84283})
    assert line == "4/4 - 1s - 246ms/step - loss: 14.7808 - mae: 3.8428"
    assert summary_line(2, 5, 0.001, {}) == "2/5 - 0s - 500us/step"
    assert summary_line(3, None, 3, {}) == "3/3 - 3s - 1000ms/step"


# --- lines ---------------------------------------------------------------------------------------


def lines_of(capsys, *args, **options):
    trainer_of(learning_rate=0.0).fit(*args, **({"verbose": 2} | options))
    out = capsys.readouterr().out
    return [re.sub(r"- \d+s - \d+(us|ms)/step", "- TIME", line) for line in out.splitlines()]


def test_two_lines_per_epoch(capsys):
    values = "val_loss: 0.0000 - val_mae: 0.0000 - learning_rate: 0.0000"
    assert lines_of(capsys, ramp(4), ramp(1), epochs=2) == [
        "Epoch 1/2",
        f"4/4 - TIME - loss: 56.0000 - mae: 6.0000 - {values}",
        "Epoch 2/2",
        f"4/4 - TIME - loss: 56.0000 - mae: 6.0000 - {values}",
    ]


def test_one_epoch_has_no_heading(capsys):
    lines = lines_of(capsys, ramp(4))
    assert len(lines) == 1
    assert lines[0].startswith("4/4 - TIME - loss: 56.0000")


def test_epochs_are_absolute(capsys):
    assert lines_of(capsys, ramp(1), epochs=4, initial_epoch=2)[::2] == ["Epoch 3/4", "Epoch 4/4"]


def test_an_unknown_length_shows_what_was_counted(capsys):
    assert lines_of(capsys, iter(ramp(3)))[0].startswith("3/3 - TIME")


def test_a_lone_evaluation_has_its_line(capsys):
    trainer_of(metrics=[]).evaluate(ramp(2), verbose=2)
    assert re.fullmatch(r"2/2 - \d+s - \d+[mu]s/step - loss: 8.0000\n", capsys.readouterr().out)


def test_silence_is_silent(capsys):
    trainer = trainer_of()
    trainer.fit(ramp(), ramp(), verbose=0)
    trainer.evaluate(ramp(), verbose=0)
    trainer.predict(ramp(), verbose=0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_predicting_prints_no_lines(capsys):
    trainer_of().predict(ramp(), verbose=2)
    assert capsys.readouterr().out == ""


# --- bars ----------------------------------------------------------------------------------------


class Paper(Screen):
    """A screen that keeps its frames."""

    width = 80

    def __init__(self):
        self.frames = []
        self.is_clear = True

    def draw(self, lines):
        self.frames.append(lines)
        self.is_clear = False

    def clear(self):
        self.is_clear = True


@pytest.fixture
def paper(monkeypatch):
    screen = Paper()
    monkeypatch.setattr(progress, "Terminal", lambda: screen)
    return screen


@pytest.fixture
def every_batch(monkeypatch):
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.0)


@pytest.mark.usefixtures("every_batch")
def test_a_bar_shows_title_count_values_rate_and_memory(paper, capsys):
    trainer_of(learning_rate=0.0).fit(ramp(4), epochs=2, verbose=1)
    paper.width = 200
    trainer_of(learning_rate=0.0).fit(ramp(1)[0], verbose=1)
    first = paper.frames[0][0]
    assert first == "Epoch 1/2 " + "─" * 16 + " 0/4"
    assert re.match(r"Epoch 1/2 ━{8}─{8} 2/4 \d+s - loss: 8.0000 - mae: 2.0000", paper.frames[2][0])
    last = paper.frames[-1][0]
    assert re.search(r"lr 0.00e\+00 - [\d,]+ examples/s - \d+% data wait - [\d.]+ .?i?B$", last)
    assert "Epoch 2/2 - 4/4 - " in capsys.readouterr().out


@pytest.mark.usefixtures("every_batch")
def test_validation_has_its_bar_below(paper):
    trainer_of().fit(ramp(2), {"a": ramp(1), "b": ramp(1)}, epochs=2, verbose=1)
    below = [lines[1] for lines in paper.frames if len(lines) == 2]
    assert any(line.startswith("Validating a 1/? - loss") for line in below)
    assert any(line.startswith("Validating b 0/1") or "Validating b ─" in line for line in below)
    above = {lines[0][:9] for lines in paper.frames if len(lines) == 2}
    assert above == {"Epoch 1/2", "Epoch 2/2"}


@pytest.mark.usefixtures("every_batch")
def test_an_unknown_length_is_known_from_the_second_epoch_on(paper):
    trainer_of().fit(lambda: iter(ramp(3)), epochs=2, verbose=1)
    assert any(" 2/?" in lines[0] for lines in paper.frames if "1/2" in lines[0])
    assert any(" 2/3" in lines[0] for lines in paper.frames if "Epoch 2/2" in lines[0])


def test_redraws_are_at_most_ten_a_second_and_values_are_read_only_then(paper, monkeypatch):
    reads, read = [], Values.vector.fget
    monkeypatch.setattr(Values, "vector", property(lambda self: (reads.append(1), read(self))[1]))
    callbacks = [Do("on_train_batch_begin", lambda _: time.sleep(0.002)), Bars()]
    start = time.perf_counter()
    trainer = trainer_of(learning_rate=0.0, metrics=[])
    trainer.fit(ramp(150), callbacks=callbacks, verbose=0, log_every=1000)
    num_draws = len(paper.frames)
    assert 2 <= num_draws <= 2 + (time.perf_counter() - start) / 0.1
    assert 0 < len(reads) <= 2 * num_draws + 6  # the epoch's end reads its values, too


def test_short_epochs_share_redraws_but_each_has_its_line(paper, capsys):
    start = time.perf_counter()
    trainer_of().fit(ramp(2), epochs=50, verbose=1)
    assert len(paper.frames) <= 2 + (time.perf_counter() - start) / 0.1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" - ")[:2] for line in lines] == [
        [f"Epoch {i}/50", "2/2"] for i in range(1, 51)
    ]


def test_a_batch_between_redraws_costs_no_call(paper):
    calls = []

    def count(frame, event, arg):
        if event == "call" and frame.f_code.co_name == "on_train_batch_end":
            calls.append(frame.f_code.co_filename)

    bars = Bars()
    never = Do("on_epoch_begin", lambda *_: setattr(bars, "due_at", float("inf")))
    sys.setprofile(count)
    try:
        trainer_of().fit(ramp(20), callbacks=[bars, never], verbose=0)
    finally:
        sys.setprofile(None)
    assert calls == []


@pytest.mark.parametrize("run", ["fit", "evaluate", "predict"])
def test_an_exception_clears_the_screen(paper, run):
    hook = {"fit": "train", "evaluate": "test", "predict": "predict"}[run]
    breaks = Do(f"on_{hook}_batch_end", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        getattr(trainer_of(), run)(ramp(), callbacks=breaks, verbose=1)
    assert paper.frames
    assert paper.is_clear


def test_leaving_predict_batches_clears_the_screen(paper):
    for _ in trainer_of().predict_batches(ramp(), verbose=1):
        assert not paper.is_clear
        break
    assert paper.is_clear


def test_evaluation_and_prediction_have_bars_and_evaluation_a_line(paper, capsys):
    trainer_of().evaluate(ramp(1), verbose=1)
    trainer_of().predict(ramp(1), verbose=1)
    titles = {lines[-1].split(" ")[0] for lines in paper.frames}
    assert titles == {"Evaluating", "Predicting"}
    assert capsys.readouterr().out == "loss: 0.0000 - mae: 0.0000\n"
    assert paper.is_clear


@pytest.mark.parametrize("width", [20, 30, 40, 80, 200])
def test_a_line_fits_its_screen_and_keeps_whole_values(width):
    bar = Bar("Epoch 10/20", 1000, 500)
    values = [f"metric_{i}: 0.5000" for i in range(9)]
    line = bar.line(width, values)
    assert len(line) < width
    assert line.startswith("Epoch 10/20 ")
    assert all(piece in values for piece in line.split(" - ")[1:])
    assert width < 40 or "500/1000" in line


class Clock:
    """A pace of 50 batches in 10 seconds, 1.2 of them waiting."""

    num_batches, seconds, share_waited = 50, 10.0, 0.12


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (24, "Epoch 3/10 ━─── 50/200"),
        (40, "Epoch 3/10 ━━────── 50/200 30s"),
        (60, "Epoch 3/10 ━━━───────── 50/200 30s - loss: 0.5000"),
        (80, "Epoch 3/10 ━━━━──────────── 50/200 30s - loss: 0.5000 - lr 1.00e-03"),
        (
            110,
            "Epoch 3/10 ━━━━━─────────────── 50/200 30s - loss: 0.5000 - lr 1.00e-03"
            " - 1,280 tokens/s - 12% data wait",
        ),
    ],
)
def test_a_screen_of_each_width_shows_what_matters_most(width, text):
    bar = Bar("Epoch 3/10", 200, 50, pace=Clock())
    pieces = ["loss: 0.5000", "lr 1.00e-03", "1,280 tokens/s", "12% data wait", "10.8 MiB"]
    assert bar.line(width, pieces) == text


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("every", ["1 steps", "epoch"])
def test_saving_has_a_line_below_the_bar(paper, tmp_path, every):
    trainer = trainer_of(learning_rate=0.0)
    trainer.fit(ramp(2), checkpoint_dir=tmp_path, checkpoint_every=every, verbose=1)
    saving = [lines for lines in paper.frames if lines[-1].startswith("Saving")]
    expected = ["Saving step 2"] if every == "epoch" else ["Saving step 1"] + 2 * ["Saving step 2"]
    assert [lines[1] for lines in saving] == expected
    assert saving[-1][0].startswith("Training ━━")
    assert paper.is_clear


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("name", ["w.safetensors", "whole"])
@pytest.mark.parametrize(("freq", "steps"), [(1, [1, 2]), ("epoch", [2])])
def test_what_a_callback_saves_has_its_line_as_well(paper, tmp_path, name, freq, steps):
    saves = ModelCheckpoint(tmp_path / name, save_freq=freq)
    trainer_of().fit(ramp(2), callbacks=saves, verbose=1)
    saving = [lines for lines in paper.frames if lines[-1].startswith("Saving")]
    assert [lines[1] for lines in saving] == [f"Saving step {step}" for step in steps]
    assert all(lines[0].startswith("Training ━━") for lines in saving)
    assert not any("Saving" in line for lines in paper.frames for line in lines[:1])


def test_quick_saves_share_redraws(paper, tmp_path):
    start = time.perf_counter()
    trainer = trainer_of(learning_rate=0.0)
    saves = ModelCheckpoint(tmp_path / "w.safetensors", save_freq=1)
    trainer.fit(ramp(100), callbacks=saves, verbose=1)
    slow = (time.perf_counter() - start) / 0.1  # a save may be slow on a busy machine
    assert 1 <= sum("Saving" in lines[-1] for lines in paper.frames) <= 2 + 2 * slow


def test_a_save_that_fails_quietly_leaves_the_bar(paper, tmp_path):
    saves = ModelCheckpoint(tmp_path / "w.safetensors")
    bars = Bars()
    trainer = trainer_of(learning_rate=1e30)
    with pytest.warns(UserWarning, match="safetensors"):
        trainer.fit(
            ramp(2), epochs=2, callbacks=[TerminateOnNaN(), saves, bars], verbose=0, log_every=1
        )
    assert not bars._current.title.startswith("Saving")


def ms_of(line):
    (number, unit) = re.search(r"- (\d+)(us|ms)/step", line).groups()
    return int(number) / (1000 if unit == "us" else 1)


@pytest.mark.parametrize("verbose", [1, 2])
@pytest.mark.parametrize("freq", [1, "1 steps"])
def test_the_time_of_a_step_is_that_of_training(capsys, verbose, freq):
    """Neither evaluations nor what callbacks do after the last batch."""
    slow = [Do(hook, lambda _: time.sleep(0.3)) for hook in ("on_test_begin", "on_epoch_end")]
    options = {"validation_freq": freq, "callbacks": slow, "verbose": verbose}
    trainer_of().fit(ramp(2), ramp(1), **options)
    line = capsys.readouterr().out.splitlines()[-1]
    assert ms_of(line) < 140
    assert "- 1s -" in line  # the whole epoch


def test_a_long_wait_for_data_is_told(monkeypatch):
    monkeypatch.setattr(format, "NOTABLE_SECONDS", 0.05)

    def late():
        time.sleep(0.1)
        yield from ramp(2)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        trainer_of(learning_rate=0.0).fit(late, verbose=2)
    assert re.search(r"ms/step - \d\d% data wait - loss", out.getvalue())


@pytest.mark.usefixtures("every_batch")
def test_where_tokens_are_counted_the_rate_is_theirs(paper):
    count = LambdaCallback(on_train_batch_end=lambda i, logs: logs.update(num_tokens=6.0 * (i + 1)))
    paper.width = 200
    trainer_of(metrics=[]).fit(ramp(3), callbacks=count, verbose=1)
    assert re.search(r"num_tokens: 18 - lr [^-]+-\d+ - [\d,]+ tokens/s", paper.frames[-1][0])


def test_counts_are_printed_whole():
    assert format_values({"num_tokens": 120.0, "val_num_tokens": 7.0}) == (
        "num_tokens: 120 - val_num_tokens: 7"
    )
    assert format_values({"loss": 14.0, "rows": 10120.0}) == "loss: 14.0000 - rows: 10120"
    assert format_values({"num_mean": 1.5, "skipped_updates": 2.0}) == (
        "num_mean: 1.5000 - skipped_updates: 2"
    )


# --- where it prints -----------------------------------------------------------------------------


def test_verbose_is_checked():
    assert [resolve_verbose(v) for v in (0, 1, 2, True)] == [0, 1, 2, 1]
    for wrong in (3, "1", "loud", None):
        with pytest.raises(ConfigurationError, match="expected 0, 1, 2 or 'auto'"):
            resolve_verbose(wrong)


def test_auto_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert resolve_verbose("auto") == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert resolve_verbose("auto") == 1


def pretend_notebook(monkeypatch, shell):
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", module)


class ZMQInteractiveShell:
    """What a Jupyter kernel runs."""


class Shell(ZMQInteractiveShell):
    """What Colab runs."""


@pytest.mark.parametrize(("shell", "found"), [(ZMQInteractiveShell(), 1), (Shell(), 1), (None, 2)])
def test_auto_is_a_bar_in_a_notebook(monkeypatch, shell, found, capsys):
    pretend_notebook(monkeypatch, shell)
    assert in_notebook() == (found == 1)
    assert resolve_verbose("auto") == found


@pytest.mark.usefixtures("every_batch")
def test_a_notebook_gets_one_line_drawn_over(monkeypatch, capsys):
    pretend_notebook(monkeypatch, ZMQInteractiveShell())
    trainer_of(learning_rate=0.0).fit(ramp(2), epochs=2)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    shown = [piece.split("\r")[-1] for piece in out.split("\n")]  # what stands there in the end
    assert [line[:17] for line in shown[:2]] == ["Epoch 1/2 - 2/2 -", "Epoch 2/2 - 2/2 -"]
    assert shown[2] == ""


def test_a_notebooks_shorter_line_leaves_nothing_of_the_longer(capsys):
    screen = Notebook()
    screen.draw(["a long line"])
    screen.draw(["short"])
    screen.clear()
    assert capsys.readouterr().out == "\ra long line\rshort      " + "\r" + " " * 5 + "\r"


def in_terminal(code, environment=None):
    """What a script writes to a terminal of 60 columns, and its exit code."""
    master, slave = pty.openpty()
    script = f"import sys; sys.path.insert(0, {TESTS!r})\n" + textwrap.dedent(code)
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"COLUMNS": "60"}
    env |= {"TERM": "xterm", **(environment or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=slave, stderr=slave, stdin=slave, env=env
    )
    os.close(slave)
    out = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.1)[0]:
            try:
                out += os.read(master, 65536)
            except OSError:  # the other side is closed
                break
    os.close(master)
    return out.decode(), process.wait()


FIT = """
from toys import *
from mlx_fit.callbacks import progress
progress.REDRAW_SECONDS = 0
trainer_of().fit(ramp(3), ramp(2), epochs=2, callbacks={callbacks})
"""
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def test_a_terminal_gets_a_bar_and_its_cursor_back():
    out, code = in_terminal(FIT.format(callbacks="()"))
    assert code == 0
    assert "━" in out
    assert out.count(HIDE) == out.count(SHOW) > 0
    assert out.rindex(SHOW) > out.rindex(HIDE)
    assert re.search(r"Epoch 2/2 - 3/3 - \d", out)


@pytest.mark.parametrize("error", ["ValueError()", "KeyboardInterrupt()"])
def test_a_failure_gives_the_cursor_back(error):
    callbacks = f"Do('on_train_batch_end', raising({error}), 1)"
    out, code = in_terminal(FIT.format(callbacks=callbacks))
    assert code != 0
    assert out.rindex(SHOW) > out.rindex(HIDE)


def test_no_color_means_no_color():
    colored, _ = in_terminal(FIT.format(callbacks="()"))
    plain, _ = in_terminal(FIT.format(callbacks="()"), {"NO_COLOR": "1"})
    assert re.search(r"\x1b\[[\d;]*m", colored)
    assert not re.search(r"\x1b\[(3|9)\d", plain)


def test_a_dumb_terminal_gets_only_the_lines():
    out, _ = in_terminal(FIT.format(callbacks="()"), {"TERM": "dumb"})
    assert "━" not in out
    assert [line[:9] for line in out.splitlines()] == ["Epoch 1/2", "Epoch 2/2"]


def test_what_a_callback_prints_stands_above_the_bar():
    callbacks = "LambdaCallback(on_train_batch_end=lambda i, logs: print('batch', i))"
    code = "from mlx_fit import LambdaCallback\n" + FIT.format(callbacks=callbacks)
    out, _ = in_terminal(code)
    assert all(f"batch {i}" in out for i in range(3))


def test_a_bar_that_is_piped_leaves_only_the_lines(capsys):
    trainer_of().fit(ramp(3), epochs=2, verbose=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]


def test_evaluating_inside_a_fit_that_shows_a_bar_works(capsys):
    trainer = trainer_of()
    look = LambdaCallback(on_epoch_end=lambda *_: trainer.evaluate(ramp(2), verbose=1))
    trainer.fit(ramp(2), epochs=2, callbacks=look, verbose=1)
    assert capsys.readouterr().out.count("Epoch") == 2


def test_lines_are_the_callback_of_verbose_2():
    assert [type(c) for c in progress.progress(2)] == [Lines]
    assert progress.progress(0) == []
