"""``mlx-fit bench``: what it measures is there, and its arithmetic is right."""

import json
import statistics

import numpy as np
import pytest
from toys import Do

from mlx_fit.cli import bench, main
from mlx_fit.cli.bench_fit import against_hand, by_hand, calls_of_batches, interval, make_rows
from mlx_fit.runtime.memory import format_bytes


def test_it_prints_a_table_and_writes_what_it_says(tmp_path, capsys):
    path = tmp_path / "new" / "bench.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    found = json.loads(path.read_text())
    [fit] = found["fit"]
    assert f"{fit['ratio']['median']:.3f}" in out
    assert fit["ratio"]["low"] <= fit["ratio"]["median"] <= fit["ratio"]["high"]
    assert f"{found['product']['cpu']['gflops']:.0f} GFLOP/s" in out
    assert f"{found['loader']['rows_per_second']:,.0f} rows/s" in out
    # Weights, both of AdamW's moments, and little else.
    weights = 4 * (bench.QUICK.side**2 + bench.QUICK.side) * 4
    assert f"save {format_bytes(round(found['checkpoint']['mib'] * 2**20))} " in out
    assert "save 0 MiB" not in out
    assert 3 * weights <= found["checkpoint"]["mib"] * 2**20 <= 3.5 * weights
    assert found["machine"]["mlx_fit"] in out


def test_a_file_that_cannot_be_written_fails_in_one_line(tmp_path, capsys):
    assert main(["bench", "--quick", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_noise_is_pointed_at(monkeypatch, capsys):
    monkeypatch.setattr(bench, "NOISY", -1.0)
    assert main(["bench", "--quick"]) == 0
    assert "Two equal loops differ" in capsys.readouterr().out


def test_the_loop_by_hand_learns():
    x, _ = make_rows(256)
    y = (x[:, 0] > 0).astype(np.int64)
    epoch = by_hand(32, x, y, 64)
    assert all(epoch() > 0 for _ in range(3))


def test_rounds_end_when_the_time_is_up():
    assert len(against_hand(8, 8, 2, 6).ratios) == 6
    assert len(against_hand(8, 8, 2, 60, seconds=0.0).ratios) == 3


def test_what_callbacks_take_is_part_of_the_time_of_fit():
    import time

    slow = Do("on_epoch_end", lambda run: time.sleep(0.05))
    assert against_hand(8, 8, 2, 3, [slow], verbose=0).over_us >= 0.02 / 2 * 1e6


def test_only_calls_of_the_package_are_counted():
    counts = calls_of_batches(8, 8, verbose=0)
    assert len(counts) == 100
    assert 1 <= statistics.median(counts) <= 15


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (3, 0, 2), (25, 7, 17), (100, 40, 59)]
)
def test_the_interval_is_that_of_the_sign_test(count, low, high):
    """Of 25 values the 8th and the 18th hold the median with 95.7 %."""
    values = np.random.default_rng(0).permutation(count).astype(float)
    assert interval(list(values)) == (np.median(values), low, high)
