"""Ctrl-C and SIGTERM while ``fit`` runs."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import mlx.core as mx
import numpy as np
import pytest
from toys import Do, Recorder, ramp, trainer_of, weight_of

from mlx_fit import EarlyStopping, LambdaCallback, Preempted
from mlx_fit.signals import Interruption, watched


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


def sends(number, hook, index=None):
    return Do(hook, send(number), index)


IN_TRAINING = ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"]
IN_VALIDATION = ["on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end"]
AT_THE_END = ["on_validation_end", "on_epoch_end", "on_train_end"]


@pytest.mark.parametrize("hook", IN_TRAINING + IN_VALIDATION + AT_THE_END)
def test_the_first_interrupt_ends_after_the_step_and_returns_the_history(hook):
    trainer, recorder = trainer_of(), Recorder()
    callbacks = [recorder, sends(signal.SIGINT, hook)]
    history = trainer.fit(ramp(3), ramp(2), epochs=2, callbacks=callbacks, verbose=0)
    assert history.stopped_by == "SIGINT"
    assert trainer.step == (1 if hook in IN_TRAINING else 6 if hook == "on_train_end" else 3)
    assert recorder.names[-1] == "train_end"


@pytest.mark.parametrize("hook", IN_TRAINING + IN_VALIDATION + AT_THE_END)
def test_sigterm_ends_after_the_step_and_raises_preempted(hook):
    trainer, recorder = trainer_of(), Recorder()
    callbacks = [recorder, sends(signal.SIGTERM, hook)]
    with pytest.raises(Preempted) as caught:
        trainer.fit(ramp(3), ramp(2), epochs=2, callbacks=callbacks, verbose=0)
    assert caught.value.code == 143
    assert caught.value.step == trainer.step > 0
    assert recorder.names[-1] == "exception"


def test_the_step_that_was_interrupted_is_whole():
    trainer, plain = trainer_of(), trainer_of()
    interrupt = sends(signal.SIGINT, "on_train_batch_begin", 1)
    trainer.fit(ramp(3), callbacks=interrupt, verbose=0)
    plain.fit(ramp(2), verbose=0)
    assert weight_of(trainer) == weight_of(plain)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_batch_end"])
def test_the_second_interrupt_raises_at_once(hook):
    interrupt, recorder = send(signal.SIGINT), Recorder()

    def twice(run):
        interrupt()
        interrupt()
        raise AssertionError("the second one should have raised")

    with pytest.raises(KeyboardInterrupt):
        trainer_of().fit(ramp(), ramp(), callbacks=[Do(hook, twice), recorder], verbose=0)
    assert recorder.names[-1] == "exception"


def test_evaluate_and_predict_outside_fit_keep_the_usual_interrupt():
    for run, hook in (("evaluate", "on_test_batch_end"), ("predict", "on_predict_batch_end")):
        with pytest.raises(KeyboardInterrupt):
            getattr(trainer_of(), run)(ramp(), callbacks=sends(signal.SIGINT, hook), verbose=0)


def test_a_sigterm_after_a_first_interrupt_is_not_lost():
    callbacks = [
        sends(signal.SIGINT, "on_train_batch_begin"),
        sends(signal.SIGTERM, "on_train_batch_end"),
    ]
    with pytest.raises(Preempted):
        trainer_of().fit(ramp(), callbacks=callbacks, verbose=0)


def test_handlers_are_there_only_while_fit_runs():
    seen = []
    watch = LambdaCallback(on_train_begin=lambda _: seen.append(signal.getsignal(signal.SIGINT)))
    trainer_of().fit(ramp(), callbacks=watch, verbose=0)
    assert seen[0] is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_are_put_back_after_a_failure():
    with pytest.raises(Preempted):
        trainer_of().fit(ramp(), callbacks=sends(signal.SIGTERM, "on_train_begin"), verbose=0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_users_sigterm_handler_runs_and_is_put_back():
    seen = []

    def mine(number, frame):
        seen.append(number)

    signal.signal(signal.SIGTERM, mine)
    with pytest.raises(Preempted):
        trainer_of().fit(ramp(), callbacks=sends(signal.SIGTERM, "on_train_batch_end"), verbose=0)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is mine


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt = sends(signal.SIGINT, "on_train_batch_end")
    history = trainer_of().fit(ramp(), epochs=2, callbacks=interrupt, verbose=0)
    assert history.stopped_by is None
    assert history.epoch == [0, 1]


def test_best_weights_come_back_when_interrupted():
    trainer = trainer_of(learning_rate=1.0)  # diverges: the first epoch is the best
    stopping = EarlyStopping("loss", patience=9, restore_best_weights=True)
    interrupt = sends(signal.SIGINT, "on_epoch_end", 2)
    trainer.fit(ramp(1) + ramp(2), epochs=9, callbacks=[stopping, interrupt], verbose=0)
    assert stopping.best_epoch == 0
    assert weight_of(trainer) == pytest.approx(weight_of(_after_one_epoch()))


def _after_one_epoch():
    trainer = trainer_of(learning_rate=1.0)
    trainer.fit(ramp(1) + ramp(2), verbose=0)
    return trainer


def test_in_another_thread_nothing_is_installed():
    seen = []

    def run():
        with watched(Interruption()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_an_uncaught_preemption_exits_with_143(tmp_path):
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from toys import Do, ramp, trainer_of
        terminate = Do("on_train_batch_end", lambda run: os.kill(os.getpid(), signal.SIGTERM))
        try:
            trainer_of().fit(ramp(), callbacks=terminate, verbose=0)
        finally:
            print("cleaned up")
    """
    tests = os.path.dirname(__file__)
    command = [sys.executable, "-c", textwrap.dedent(code), tests]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "cleaned up\n")


class KilledOnce:
    """An MLX function whose C++ compiler is killed by a Ctrl-C in its first call."""

    def __init__(self, function):
        self.function = function
        self.num_calls = 0

    def __call__(self, *arrays):
        self.num_calls += 1
        if self.num_calls == 1:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("[Compile::eval_cpu] Could not compile: the compiler was killed.")
        return self.function(*arrays)


@pytest.mark.parametrize(
    ("name", "options"), [("async_eval", {}), ("eval", {"on_oom": "split"})], ids=str
)
def test_a_ctrl_c_that_kills_the_compiler_of_mlx_ends_after_the_step(name, options, monkeypatch):
    """A terminal sends it to the whole group of processes; the step is computed once more."""
    trainer, plain = trainer_of(**options), trainer_of()
    killed = KilledOnce(getattr(mx, name))
    start = Do("on_train_begin", lambda _: monkeypatch.setattr(mx, name, killed))
    history = trainer.fit(ramp(3), callbacks=start, verbose=0)
    monkeypatch.undo()
    assert killed.num_calls > 0
    assert history.stopped_by == "SIGINT"
    assert trainer.step == 1
    plain.fit(ramp(3), max_steps=trainer.step, verbose=0)
    np.testing.assert_array_equal(np.array(trainer.model.weight), np.array(plain.model.weight))
