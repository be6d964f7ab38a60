"""Timer."""

import datetime
import json
import time

import pytest
from toys import Do, Recorder, ramp, trainer_of

from mlx_fit import ConfigurationError, Timer
from mlx_fit.callbacks import timer


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timer, "time", clock)
    monkeypatch.setattr("mlx_fit.loop.perf_counter", clock.perf_counter)
    return clock


def fit_of_seconds(callback, clock, num_batches=10, extra=(), **options):
    """A fit in which every batch takes a second."""
    trainer, num_seen = trainer_of(), []

    def tick(_):
        clock.now += 1.0
        num_seen.append(1)

    callbacks = [Do("on_train_batch_end", tick), callback, *extra]
    options = {"callbacks": callbacks, "verbose": 0} | options
    return trainer.fit(ramp(num_batches), **options), len(num_seen)


def test_it_ends_after_the_step_in_which_the_time_is_up(clock):
    callback, events = Timer(2.5), Recorder()
    history, num_seen = fit_of_seconds(callback, clock, extra=[events], epochs=3)
    assert num_seen == 3
    assert history.stopped_by == "Timer"
    assert history.epoch == [0]
    assert events.names[-2:] == ["epoch_end", "train_end"]
    assert callback.elapsed_seconds == 3.0
    assert callback.remaining_seconds == 0.0


def test_with_enough_time_nothing_ends(clock):
    callback = Timer(100)
    history, num_seen = fit_of_seconds(callback, clock, epochs=2)
    assert (num_seen, history.stopped_by) == (20, None)
    assert callback.remaining_seconds == 80.0


def test_time_used_by_validation_counts(clock):
    def spend(_):
        clock.now += 50.0

    extra = [Do("on_test_begin", spend)]
    history, _ = fit_of_seconds(Timer(20), clock, 10, extra, epochs=3, val=ramp(1))
    assert history.epoch == [0]


def test_the_budget_is_that_of_all_parts_of_a_resumed_run(clock):
    first = Timer(5)
    fit_of_seconds(first, clock, 3)
    state = json.loads(json.dumps(first.state_dict()))
    clock.now += 1000.0  # between the processes no time is used
    second = Timer(5)
    load = Do("on_train_begin", lambda _: second.load_state_dict(state))
    _, num_seen = fit_of_seconds(second, clock, extra=[load])
    assert num_seen == 2
    assert second.elapsed_seconds == 5.0


def test_a_spent_budget_asks_for_the_end_as_soon_as_it_is_loaded(clock):
    first, asked = Timer(1), []
    fit_of_seconds(first, clock, 3)
    second = Timer("1s")
    load = Do("on_train_begin", lambda _: second.load_state_dict(first.state_dict()))
    look = Do("on_epoch_begin", lambda run: asked.append(run.stop_training))
    fit_of_seconds(second, clock, extra=[load, look])
    assert asked == [True]


def test_a_larger_budget_given_on_resume_wins(clock):
    first, second = Timer(3), Timer(5)
    fit_of_seconds(first, clock)
    load = Do("on_train_begin", lambda _: second.load_state_dict(first.state_dict()))
    assert fit_of_seconds(second, clock, extra=[load])[1] == 2


def test_a_new_fit_has_the_whole_budget(clock):
    callback = Timer(3)
    for _ in range(2):
        assert fit_of_seconds(callback, clock)[1] == 3


def test_the_clock_stands_still_after_the_fit(clock):
    callback = Timer(100)
    fit_of_seconds(callback, clock)
    clock.now += 5.0
    assert callback.elapsed_seconds == 10.0


def test_it_works_with_the_real_clock():
    trainer = trainer_of()
    slow = Do("on_train_batch_end", lambda _: time.sleep(0.02))
    history = trainer.fit(ramp(50), epochs=9, callbacks=[slow, Timer("100ms")], verbose=0)
    assert history.stopped_by == "Timer"
    assert 1 <= trainer.step < 50


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        (90, 90.0),
        (0.5, 0.5),
        ("12h", 43200.0),
        ("90 minutes", 5400.0),
        ("1h30m", 5400.0),
        ("1 hour 30 min", 5400.0),
        ("200ms", 0.2),
        ("1.5 Days", 129600.0),
        ("45 sec", 45.0),
        (datetime.timedelta(minutes=2), 120.0),
    ],
)
def test_a_budget_may_be_written_in_many_ways(budget, seconds):
    assert Timer(budget).budget_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    "budget",
    ["", "12", "h", "12x", "1h later", "-1h", 0, -1, None, True, "0s", "5mo"],
)
def test_a_wrong_budget_is_named(budget):
    with pytest.raises(ConfigurationError, match="Timer: budget="):
        Timer(budget)
