"""Memory readings, limits, and sizes as text."""

import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_fit.errors import ConfigurationError
from mlx_fit.runtime import memory


def test_active_and_peak_count_live_arrays():
    before = memory.active_bytes()
    memory.reset_peak()
    array = mx.zeros((1 << 20,)) + 1
    mx.eval(array)
    assert memory.active_bytes() - before >= 4 << 20
    del array
    assert memory.active_bytes() == before
    assert memory.peak_bytes() - before >= 4 << 20
    memory.reset_peak()
    assert memory.peak_bytes() - before < 4 << 20


def test_the_cache_is_what_was_freed_and_kept():
    mx.clear_cache()
    array = mx.zeros((1 << 18,)) + 1
    mx.eval(array)
    del array
    assert memory.cache_bytes() >= 1 << 20
    mx.clear_cache()
    assert memory.cache_bytes() == 0


def test_the_limit_is_at_most_what_mlx_may_use():
    previous = mx.set_memory_limit(123_456_789)
    try:
        assert memory.limit_bytes() == 123_456_789
    finally:
        mx.set_memory_limit(previous)
    assert 0 < memory.limit_bytes() <= previous


@pytest.fixture
def machine(tmp_path):
    """Writes files below a root folder that stands for ``/``."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_a_container_of_version_2_limits_memory(machine):
    root = machine(
        proc__meminfo="MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        proc__self__cgroup="0::/job/step\n",
    )
    group = root / "sys/fs/cgroup/job/step"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("5000000\n")
    (group.parent / "memory.current").write_text("3000000\n")
    (group.parent / "memory.stat").write_text("anon 2000000\ninactive_file 1000000\n")
    assert memory._left_on_linux(root) == [8_192_000, 3_000_000]


def test_a_container_of_version_1_limits_memory_by_the_top_folder(machine):
    root = machine(proc__self__cgroup="5:cpu:/x\n4:memory:/not/mounted/here\n")
    group = root / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("7000000\n")
    (group / "memory.usage_in_bytes").write_text("8000000\n")
    (group / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 2500000\n")
    assert memory._left_on_linux(root) == [1_500_000]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's files")
def test_the_limit_follows_what_the_machine_has_left(monkeypatch):
    if mx.default_device() != mx.cpu:
        pytest.skip("the device is a GPU, which has a limit of its own")
    monkeypatch.setattr(memory, "_left_on_linux", lambda: [1_000_000, 2_000_000])
    array = mx.zeros((1 << 18,)) + 1
    mx.eval(array)
    held = memory.active_bytes() + memory.cache_bytes()
    assert held >= array.nbytes
    assert memory.limit_bytes() == held + 1_000_000


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_the_resident_size_is_that_of_ps():
    ballast = bytearray(b"x") * (64 << 20)
    told = memory.process_rss_bytes()
    kibibytes = subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])
    assert told > len(ballast)
    assert told == pytest.approx(int(kibibytes) * 1024, rel=0.1)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**20 - 1, "1.0 MiB"),
        (5 * 2**50, "5120.0 TiB"),
    ],
)
def test_sizes_are_written_in_powers_of_1024(num_bytes, text):
    assert memory.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [(7, 7), ("8GB", 8 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("9 B", 9)],
)
def test_sizes_are_read_with_their_units(size, num_bytes):
    assert memory.parse_bytes(size, "memory_limit") == num_bytes


@pytest.mark.parametrize("size", ["8", "8 GBit", "-1GB", "", -1, 1.5, True, None])
def test_what_is_not_a_size_is_refused_by_name(size):
    with pytest.raises(ConfigurationError, match=r"cache_limit=.* is not a size: .*'8GB'"):
        memory.parse_bytes(size, "cache_limit")


def test_a_share_of_the_machine_is_a_limit_while_it_is_set():
    held, left = memory.room()
    assert held <= memory.active_bytes() + memory.cache_bytes() + 1_000_000
    assert left is None or left >= 0
    name = "this rank's share of what its machine or container has"
    before = memory.limits()
    memory.set_share(12_345)
    try:
        assert memory.limits()[name] == memory.limit_bytes() == 12_345
    finally:
        memory.set_share(None)
    assert memory.limits().keys() == before.keys()
