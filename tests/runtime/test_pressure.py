"""Readings of memory pressure, from recorded texts of Linux and macOS."""

from __future__ import annotations

import sys
import warnings

import mlx.core as mx
import pytest

from mlx_fit.runtime import pressure, watch
from mlx_fit.runtime.pressure import PressureWatch

PRESSURE = (
    "some avg10=23.50 avg60=4.10 avg300=0.98 total=8123456\n"
    "full avg10=1.00 avg60=0.50 avg300=0.10 total=4123456\n"
)
VMSTAT = "nr_free_pages 123\npswpin 17\npswpout {}\npgpgin 4\n"
MEMORY_PRESSURE = (
    "The system has 17179869184 (1048576 pages with a page size of 16384).\n"
    "System-wide memory free percentage: 7%\n"
)
VM_STAT = (
    "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
    "Pages free:                               12345.\n"
    "Swapins:                                     17.\n"
    "Swapouts:                                 20000.\n"
)


def linux(tmp_path, pages=0, text=PRESSURE):
    (tmp_path / "proc/pressure").mkdir(parents=True, exist_ok=True)
    (tmp_path / "proc/pressure/memory").write_text(text)
    (tmp_path / "proc/vmstat").write_text(VMSTAT.format(pages))
    return tmp_path


def test_linuxs_files_are_read(tmp_path):
    root = linux(tmp_path, 100)
    assert pressure.stalled_percent(root) == 23.5
    assert pressure.swapped_out_bytes(root) == 409_600


def test_a_kernel_without_them_tells_nothing(tmp_path):
    assert pressure.stalled_percent(tmp_path) is None
    assert pressure.swapped_out_bytes(tmp_path) is None


def test_macoss_texts_are_read():
    assert pressure.free_percent_of(MEMORY_PRESSURE) == 7
    assert pressure.swapped_out_bytes_of(VM_STAT) == 20000 * 16384
    assert pressure.free_percent_of("sh: not found") is None
    assert pressure.swapped_out_bytes_of("") is None


@pytest.fixture
def on_linux(monkeypatch, tmp_path):
    """The watch sees the files of ``tmp_path``."""
    monkeypatch.setattr(sys, "platform", "linux")
    root = linux(tmp_path, text="some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    for name in ("stalled_percent", "swapped_out_bytes"):
        read = getattr(pressure, name)
        monkeypatch.setattr(pressure, name, lambda read=read: read(root))
    return root


def test_swap_that_grows_and_stalls_are_found_on_linux(on_linux):
    found = PressureWatch()
    assert found.found() == ""
    linux(on_linux, 2**17, "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    assert found.found() == "512 MiB were written to swap since training began"
    linux(on_linux)
    assert "24 % of the last 10 seconds" in found.found()


def test_little_that_is_free_is_found_on_macos(monkeypatch):
    texts = {"vm_stat": VM_STAT, "memory_pressure": MEMORY_PRESSURE}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(pressure, "_output", lambda name, *_: texts[name])
    found = PressureWatch()
    assert found.found() == "only 7 % of memory are free"
    texts["vm_stat"] = VM_STAT.replace("20000.", "60000.")
    assert "625 MiB were written to swap" in found.found()


def test_commands_that_are_not_there_tell_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", "/nowhere")
    assert PressureWatch().found() == ""


# --- the watch of a fit ---------------------------------------------------------------------------


@pytest.fixture
def cache():
    """MLX's cache with Metal's default limit: all of memory."""
    before = mx.set_cache_limit(mx.get_memory_limit())
    mx.clear_cache()
    yield
    mx.set_cache_limit(before)
    mx.clear_cache()


def limit_now():
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_the_cache_is_bounded_by_the_peak_while_it_watches(cache):
    mx.reset_peak_memory()
    memory = watch.MemoryWatch()
    with memory.watching():
        assert limit_now() <= max(watch.LEAST_CACHE, 1.25 * watch.peak_bytes()) + 1
        mx.eval(mx.zeros((1 << 26,)) + 1)  # 256 MiB
        memory.look()
        assert 256 << 20 < limit_now() < 2 * watch.peak_bytes()
    assert limit_now() == mx.get_memory_limit()


@pytest.mark.parametrize("limit", [0, 100 << 20])
def test_a_users_own_limit_stays(limit, cache):
    mx.set_cache_limit(limit)
    memory = watch.MemoryWatch()
    with memory.watching():
        memory.look()
        assert limit_now() == limit
    assert limit_now() == limit


def test_the_limit_is_put_back_after_an_error(cache):
    with pytest.raises(ZeroDivisionError), watch.MemoryWatch().watching():
        raise ZeroDivisionError
    assert limit_now() == mx.get_memory_limit()


def test_shapes_that_vary_do_not_fill_the_cache(cache):
    memory, most = watch.MemoryWatch(), 0
    mx.reset_peak_memory()
    with memory.watching():
        for number in range(48):
            mx.eval(mx.zeros((1 << 19, 1 + number % 16)) + number)
            memory.look()
            most = max(most, mx.get_cache_memory())
    assert most <= max(watch.LEAST_CACHE, 1.3 * watch.peak_bytes())
    mx.clear_cache()
    for number in range(48):  # the control: without a bound it grows
        mx.eval(mx.zeros((1 << 19, 1 + number % 16)) + number)
    assert mx.get_cache_memory() > 2 * most


def test_a_shortage_is_said_once_a_run(monkeypatch):
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    monkeypatch.setattr(PressureWatch, "found", lambda self: "only 3 % of memory are free")
    memory = watch.MemoryWatch()
    for _ in range(2):
        with memory.watching():
            with pytest.warns(UserWarning, match="only 3 % of memory are free"):
                memory.look()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                memory.look()


def test_the_system_is_looked_at_every_ten_seconds_at_most(monkeypatch):
    looks, clock = [], [100.0]
    monkeypatch.setattr(PressureWatch, "found", lambda self: looks.append(1) or "")
    monkeypatch.setattr(watch, "perf_counter", lambda: clock[0])
    memory = watch.MemoryWatch()
    with memory.watching():
        for _ in range(100):
            clock[0] += 1.0
            memory.look()
    assert len(looks) == 10
