"""The clock of an epoch's training."""

import time

import mlx.core as mx
import pytest
from toys import Do, Recorder, ramp, trainer_of

from mlx_fit import Profiler
from mlx_fit.pace import Pace


def test_pauses_are_none_of_it_and_it_stands_once_stopped():
    pace = Pace()
    with pace.paused():
        before = pace.seconds
        time.sleep(0.05)
        assert pace.seconds == before
    assert pace.seconds < 0.04
    pace.stop()
    stopped = pace.seconds
    time.sleep(0.01)
    assert pace.seconds == stopped


def test_the_wait_is_the_datas():
    def slow():
        for batch in ramp(4):
            time.sleep(0.02)
            yield batch

    trainer = trainer_of()
    sleeps = Do("on_test_begin", lambda _: time.sleep(0.1))
    trainer.fit(slow, ramp(1), validation_freq="1 steps", callbacks=sleeps, verbose=0)
    pace = trainer.pace
    assert pace.num_batches == 4
    assert 19 < pace.wait_ms < 60
    assert pace.waited <= pace.seconds < 0.4
    assert 0 < pace.share_waited <= 1


@pytest.mark.parametrize("options", [{"log_every": 1}, {"max_steps": 4}], ids=str)
def test_the_wait_for_a_step_is_training_also_where_something_is_due(options, monkeypatch):
    trainer, synchronize = trainer_of(), mx.synchronize
    monkeypatch.setattr(mx, "synchronize", lambda: (time.sleep(0.03), synchronize()))
    trainer.fit(ramp(4), verbose=0, **options)
    assert trainer.pace.seconds > 0.12


def test_saves_of_a_fit_have_their_hooks_and_their_phase(tmp_path):
    recorder, profiler = Recorder(), Profiler(prints=False)
    slow = Do("on_save_begin", lambda _: time.sleep(0.05))
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": "2 steps", "verbose": 0}
    trainer_of().fit(ramp(4), callbacks=[profiler, recorder, slow], **options)
    names = [name for name in recorder.names if name.startswith("save")]
    assert names == ["save_begin", "save_end"] * 3  # after steps 2 and 4, and the epoch's end
    assert profiler.counts["checkpoints"] > 0
    assert profiler.seconds["data wait"] < 0.04
    assert sum(profiler.seconds.values()) == pytest.approx(
        profiler._mark - profiler._start, rel=0.05
    )
