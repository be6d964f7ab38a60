"""DeviceMonitor."""

import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from toys import Do, batch_of, ramp, trainer_of

from mlx_fit import ConfigurationError, CSVLogger, DeviceMonitor
from mlx_fit.callbacks import device_monitor
from mlx_fit.runtime.memory import reset_peak
from mlx_fit.runtime.utilisation import gpu_percent, parse_gpu_percent

KEYS = {"memory_active_mib", "memory_cache_mib", "memory_peak_mib", "data_wait_ms", "cpu_percent"}


def history_of(data, *callbacks, **options):
    options = {"callbacks": [DeviceMonitor(0.01), *callbacks], "verbose": 0} | options
    return trainer_of(metrics=[]).fit(data, **options).history


def slow(batches, seconds):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def test_an_epoch_has_the_facts_as_floats():
    history = history_of(ramp(2), epochs=2)
    assert set(history) == {"loss", "learning_rate"} | KEYS
    assert all(type(history[key][0]) is float and history[key][0] >= 0 for key in KEYS)


def test_memory_is_mlxs():
    reset_peak()  # what plans of other tests have reached is kept besides MLX's own counter
    held = mx.zeros((1024, 1024))
    mx.eval(held)
    history = history_of(ramp(2))
    assert history["memory_active_mib"][0] == pytest.approx(mx.get_active_memory() / 2**20, abs=0.2)
    assert history["memory_peak_mib"][0] == mx.get_peak_memory() / 2**20
    del held


def test_data_wait_is_the_loaders_and_evaluations_are_none_of_it():
    fast = history_of(ramp(5))["data_wait_ms"][0]
    waited = history_of(lambda: slow(ramp(5), 0.02))["data_wait_ms"][0]
    assert fast < waited
    assert waited > 19
    validated = history_of(
        lambda: slow(ramp(5), 0.02),
        Do("on_test_begin", lambda _: time.sleep(0.5)),
        val=ramp(1),
        validation_freq="1 steps",
    )
    assert 19 < validated["data_wait_ms"][0] < 350


def test_the_cpu_is_busy_when_it_works_and_idle_when_it_sleeps():
    def work(_):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            np.ones(1000).sum()

    busy = history_of(ramp(1), Do("on_train_batch_end", work))["cpu_percent"][0]
    idle = history_of(ramp(1), Do("on_train_batch_end", lambda _: time.sleep(0.2)))
    assert idle["cpu_percent"][0] < busy
    assert busy <= 110


def test_the_gpu_is_sampled_where_it_can_be(monkeypatch):
    before = threading.active_count()
    monkeypatch.setattr(device_monitor, "gpu_command", lambda: ("printf", "40\\n60\\n"))
    monkeypatch.setattr(device_monitor.mx, "default_device", lambda: mx.Device(mx.gpu))
    monitor = DeviceMonitor(0.01)
    monitor.on_train_begin({})
    assert threading.active_count() == before + 1
    end = time.monotonic() + 60
    while not monitor._samples and time.monotonic() < end:
        time.sleep(0.01)
    monitor.on_train_end({})
    assert set(monitor._samples) == {60.0}
    assert threading.active_count() == before


def test_outputs_of_the_systems_commands_are_understood():
    apple = '| "PerformanceStatistics" = {"Tiler Utilization %"=3,"Device Utilization %"=87}'
    assert parse_gpu_percent(apple) == 87
    assert parse_gpu_percent("[N/A]\n") is None
    assert gpu_percent(("a-command-that-is-not-there",)) is None


def test_no_validation_columns_are_made_of_them(tmp_path):
    history_of(ramp(2), CSVLogger(tmp_path / "log.csv"), val=ramp(1))
    columns = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {c for c in columns if c.startswith("val_")} == {"val_loss"}


def test_the_printed_line_stays_short(capsys):
    history_of(ramp(2), verbose=2)
    assert not any(key in capsys.readouterr().out for key in KEYS)


def test_it_changes_no_bit():
    watched, plain = trainer_of(), trainer_of()
    watched.fit(ramp(3), callbacks=DeviceMonitor(), verbose=0)
    plain.fit(ramp(3), verbose=0)
    assert mx.array_equal(watched.model.weight, plain.model.weight)


def test_an_epoch_of_one_batch_works():
    assert history_of([batch_of(1)])["data_wait_ms"][0] >= 0


@pytest.mark.parametrize("interval", [0, -1, "1", None])
def test_a_wrong_interval_is_named(interval):
    with pytest.raises(ConfigurationError, match="DeviceMonitor: interval="):
        DeviceMonitor(interval)
