"""The cost model against numbers worked out by hand, and the tables of the documentation."""

from pathlib import Path

import pytest

import mlx_fit
from mlx_fit.distributed import cost
from mlx_fit.distributed.cost import Sync, compute_seconds
from mlx_fit.errors import ConfigurationError


@pytest.mark.parametrize(
    ("ranks", "scheme", "sent"),
    [
        (1, "float32", 0),
        (2, "float32", 4_000_000),  # 2 * 1/2 * 4 MB
        (4, "float32", 6_000_000),  # 2 * 3/4 * 4 MB
        (4, "bfloat16", 3_000_000),
        (4, "int8", 3_000_000),  # 3 * 1 MB: no fewer than bfloat16
        (2, "int8", 1_000_000),
        (2, "powersgd:4", 31_250),  # 2 * 4 / 1024 of 4 MB
        (2, "powersgd:4096", 4_000_000),  # never more than uncompressed
    ],
)
def test_bytes_by_hand(ranks, scheme, sent):
    assert Sync(1_000_000, ranks, 1, scheme=scheme).num_bytes == pytest.approx(sent)


def test_seconds_by_hand():
    """8 B float32 parameters on 4 ranks at 10 Gbit/s: 48 GB at 1.25 GB/s, and 6 rounds."""
    sync = Sync(8_000_000_000, 4, 10, compute_seconds=10.0, latency=1e-3, overhead_seconds=0.5)
    assert sync.sync_seconds == pytest.approx(38.4 + 0.006 + 0.5)
    assert sync.step_seconds == pytest.approx(10 + 38.906)
    assert sync.share == pytest.approx(38.906 / 48.906)
    assert sync.speedup == pytest.approx(4 * 10 / 48.906)


def test_rarer_synchronisation_divides_the_traffic():
    often, rarely = (Sync(1_000_000, 2, 1, 0.1, every=every) for every in (1, 8))
    assert rarely.step_seconds - 0.1 == pytest.approx((often.step_seconds - 0.1) / 8)


def test_latency_alone_by_hand():
    sync = Sync(1, 1024, 1e6, latency=50e-6)
    assert sync.sync_seconds == pytest.approx(2 * 1023 * 50e-6, rel=1e-6)
    gathered = Sync(1, 1024, 1e6, latency=50e-6, scheme="int8")
    assert gathered.sync_seconds == pytest.approx(1023 * 50e-6, rel=1e-6)
    factors = Sync(1, 1024, 1e6, latency=50e-6, scheme="powersgd:1")
    assert factors.sync_seconds == pytest.approx(4 * 1023 * 50e-6, rel=1e-6)


def test_one_rank_alone_pays_nothing():
    alone = Sync(1_000_000, 1, 1, 0.1, overhead_seconds=9)
    assert (alone.num_bytes, alone.sync_seconds, alone.share, alone.speedup) == (0, 0, 0, 1)
    assert Sync(1, 1, 1).share == 0


def test_computing_takes_six_operations_a_parameter_and_token():
    assert compute_seconds(1_000_000_000, 2048, 10) == pytest.approx(1.2288)


def test_the_model_reproduces_what_was_measured():
    base = Sync(10_000_000, 2, 0.1, cost.MEASURED_COMPUTE).step_seconds
    for _, scheme, every, overhead, ratio in cost.MEASURED:
        sync = Sync(
            10_000_000, 2, 0.1, cost.MEASURED_COMPUTE, scheme, every, overhead_seconds=overhead
        )
        assert base / sync.step_seconds == pytest.approx(ratio, rel=0.05)


def test_the_documentation_has_the_tables():
    text = (Path(mlx_fit.__file__).parents[1] / "docs" / "distributed.md").read_text()
    tables = [part for part in cost.document().split("\n\n") if part.startswith("|")]
    assert len(tables) == 7
    assert [table for table in tables if table not in text] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_parameters": 0},
        {"num_ranks": 0},
        {"gigabits": 0},
        {"gigabits": -1},
        {"scheme": "int4"},
        {"scheme": "powersgd:0"},
        {"every": 0},
        {"latency": -1},
        {"compute_seconds": float("nan")},
        {"width": 0},
    ],
    ids=str,
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Sync(**{"num_parameters": 1, "num_ranks": 2, "gigabits": 1, **wrong})
