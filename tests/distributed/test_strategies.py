"""Strategies on two real processes, against data parallel and against one process."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import rank_cases
from ranks import run_cases

from mlx_fit.distributed import DiLoCo, LocalSGD, ShardedOptimizer
from mlx_fit.distributed.desync import checksum
from mlx_fit.distributed.partition import elementwise, on_rank_0, whole_parameters
from mlx_fit.errors import ConfigurationError

NAMES = [
    *("zero1", "zero1_checkpoints", "zero1_thawed", "parameter_server", "local_sgd"),
    *("diloco_resumed", "sharded_optimizer", "desync", "other_arguments"),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_cases(2, NAMES, tmp_path_factory.mktemp("strategies"))


def distance(one, other):
    """The largest difference of two sets of named arrays."""
    assert one.keys() == other.keys()
    return max(np.abs(np.subtract(one[name], other[name])).max() for name in one)


@pytest.mark.parametrize("name", rank_cases.OPTIMIZERS)
def test_zero1_is_data_parallel_to_the_bit_with_half_the_state(two, name):
    sizes = []
    for rank in two["zero1"]:
        (expected, history, whole), (found, same_history, own) = rank[name]
        assert found == expected
        assert same_history == history
        sizes.append(own)
    settings = 2  # step and learning rate, which every rank has
    assert sum(sizes) == whole + settings
    if name not in ("adafactor", "muon"):  # these are divided by whole parameters
        assert abs(sizes[0] - sizes[1]) <= 2


def test_the_files_of_zero1_are_those_of_data_parallel(two):
    assert two["zero1_checkpoints"][0]["equal"]


def test_a_run_goes_on_by_another_strategy(two):
    found = two["zero1_checkpoints"][0]
    assert found["zero1"] == found["data_parallel"] == found["parameter_server"]
    assert found["zero1"]["updates"] == 6


def test_state_is_divided_anew_when_more_is_trained(two):
    expected, found = two["zero1_thawed"][0]
    assert found == expected


def test_a_parameter_servers_state_is_on_rank_0_alone(two):
    first, second = two["parameter_server"]
    assert first["run"] == second["run"]
    assert (first["state"], second["state"]) == (2 + 2 * 4, 2)
    expected = two["zero1"][0]["adamw"]
    assert expected  # ran as well, with a schedule


def test_local_sgd_meets_every_eight_updates_and_at_the_end(two):
    for found in two["local_sgd"][0].values():
        assert [step for step, equal in enumerate(found["equal"], 1) if equal] == [8, 16]
        assert found["ends"] == 1


def test_diloco_of_rate_1_without_momentum_is_the_mean(two):
    found = two["local_sgd"][0]
    assert distance(found["diloco1"]["weights"], found["local_sgd0"]["weights"]) < 1e-6
    assert distance(found["diloco2"]["weights"], found["local_sgd0"]["weights"]) > 1e-3


def test_a_checkpoint_inside_a_round_holds_all_of_it(two):
    for found in two["diloco_resumed"]:
        assert found["num_updates"] == [3, 3]
        assert [found["names"], found["anchor"], found["velocity"]] == [True] * 3
        assert found["step"] == 20


def test_sharded_optimizer_is_the_optimizer_over_all_rows(two):
    optimizer = optim.AdamW(1e-2)
    expected = rank_cases.hand_written(optimizer, 1)
    state = {name: np.array(value) for name, value in rank_cases.tree_flatten(optimizer.state)}
    for found in two["sharded_optimizer"]:
        assert distance(found["weights"], expected) < 1e-6
        assert distance(found["state"], state) < 1e-6
        assert found["again"]


def test_one_flipped_bit_is_found_and_named(two):
    for found in two["desync"]:
        assert found["type"] == "ParameterDesyncError"
        assert "After step 10 " in found["text"]
        assert "layers.2.weight" in found["text"]


def test_other_arguments_on_one_rank_are_named(two):
    for found in two["other_arguments"]:
        texts = [error["text"] for error in found]
        assert "batch_size is 12 on rank 0 and 13 on rank 1" in texts[0]
        assert "every is 8 on rank 0 and 9 on rank 1" in texts[1]
        assert "epochs is 2 on rank 0 and 3 on rank 1" in texts[2]
        assert "The number of rows of train is 40 on rank 0 and 41 on rank 1" in texts[3]
        assert "learning_rate is 0.1" in texts[4]
        assert "layers.2.weight is (4, 16) float32" in texts[5]
        assert found[5]["type"] == "PlanMismatchError"


def test_pieces_cover_everything_once():
    sizes = {"a": (7, "float32"), "b": (1, "float32"), "c": (5, "bfloat16")}
    for divide in (elementwise, whole_parameters, on_rank_0):
        for num_ranks in (1, 2, 3, 5):
            spans = divide(sizes, num_ranks).spans
            for name, (size, _) in sizes.items():
                covered = [i for part in spans if name in part for i in range(*part[name])]
                assert covered == list(range(size))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32, mx.uint8])
def test_a_checksum_changes_with_any_bit_and_with_the_order(dtype):
    array = mx.arange(12).astype(dtype)
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[dtype.size]
    for bit in range(8 * dtype.size):
        words = array.view(kind)
        words[5] = words[5] ^ mx.array(1 << bit, kind)
        assert checksum(words.view(dtype)).item() != checksum(array).item()
    assert checksum(array[::-1]).item() != checksum(array).item()


@pytest.mark.parametrize(
    "make",
    [
        lambda: LocalSGD(0),
        lambda: DiLoCo(2.5),
        lambda: DiLoCo(8, outer_momentum=1.0),
        lambda: DiLoCo(8, outer_learning_rate=-1),
        lambda: ShardedOptimizer("adam"),
        lambda: ShardedOptimizer(optim.MultiOptimizer([optim.SGD(0.1)])),
    ],
)
def test_arguments_of_strategies_are_checked(make):
    with pytest.raises(ConfigurationError):
        make()


def test_alone_a_sharded_optimizer_is_the_optimizer():
    found = rank_cases.hand_written(ShardedOptimizer(optim.Adam(1e-2)), 1)
    assert found == rank_cases.hand_written(optim.Adam(1e-2), 1)
