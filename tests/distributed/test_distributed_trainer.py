"""DistributedTrainer on real processes: equal to one process, and the same on all of them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import rank_cases
from rank_cases import mlp, rows, weights
from ranks import end, run_cases, start

from mlx_fit import DataLoader, DistributedTrainer, SyncPolicy, Trainer
from mlx_fit.distributed import DataParallel, SyncMonitor
from mlx_fit.distributed.windows import folded
from mlx_fit.errors import ConfigurationError

SAME_AS_ONE = [
    *("sgd", "adamw_with_validation", "accumulated", "weighted", "ignored_labels"),
    *("class_weights", "function_objective", "fewer_rows_than_ranks", "frozen_half"),
    *("epochs_of_steps", "early_stopping", "nan_skipped", "nan_raises", "buckets"),
    *("evaluation", "prediction", "language_model"),
]
OF_TWO = [
    *("mixed_precision", "loader", "uneven_joined", "uneven_stopped", "accumulated_uneven"),
    *("other_weights", "dropout", "batch_norm", "stop_on_one_rank", "stop_between_epochs"),
    *("one_sum_an_update", "half_precision_sums", "own_lists", "own_predictions", "files"),
    *("bytes_of_a_sum", "overlapped", "saved_in_a_window", "statistics_saved_in_a_window"),
    *("full_disk", "watched", "out_of_step"),
]
DIFFERENT = (
    "statistics_saved_in_a_window",
    "dropout",
    "files",
    "own_predictions",
    "watched",
    "out_of_step",
)
OF_THREE = ["sgd", "accumulated", "fewer_rows_than_ranks", "evaluation", "prediction", "loader"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    found = run_cases(2, SAME_AS_ONE, tmp_path_factory.mktemp("same"))
    return found | run_cases(2, OF_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run_cases(3, OF_THREE, tmp_path_factory.mktemp("three"))


def assert_close(found, expected, path="", tolerance=1e-5):
    """Trees of numbers and texts are equal, numbers up to the tolerance."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys() - {"skipped_updates"}, path
        for key in expected.keys() & found.keys():
            assert_close(found[key], expected[key], f"{path}.{key}", tolerance)
    elif isinstance(expected, (list, tuple)) and expected and isinstance(expected[0], dict):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{path}[{index}]", tolerance)
    elif isinstance(expected, str) or expected is None:
        assert found == expected, path
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("name", SAME_AS_ONE)
def test_two_ranks_do_what_one_process_does(two, name, tmp_path):
    expected = rank_cases.CASES[name](tmp_path)
    for found in two[name]:
        assert_close(found, expected, name)


@pytest.mark.parametrize("name", [name for name in OF_THREE if name != "loader"])
def test_three_ranks_do_what_one_process_does(three, name, tmp_path):
    assert_close(three[name][0], rank_cases.CASES[name](tmp_path), name)


@pytest.mark.parametrize("name", [n for n in SAME_AS_ONE + OF_TWO if n not in DIFFERENT])
def test_all_ranks_return_the_same(two, name):
    assert two[name][0] == two[name][1]


def test_three_ranks_return_the_same(three):
    assert all(found[0] == found[1] == found[2] for found in three.values())


def test_alone_it_is_the_trainer_bit_for_bit():
    found = []
    for kind in (Trainer, DistributedTrainer):
        model = mlp()
        trainer = kind(model, optim.AdamW(1e-2), "cross_entropy", batch_size=12, seed=1)
        history = trainer.fit(rows(), rows(33), epochs=2, verbose=0)
        found.append((history.history, weights(model)))
    assert found[0] == found[1]
    assert trainer.communicator.size == 1


def test_a_mean_of_means_is_another_result():
    """What the tests above would not notice otherwise: 60 rows, of which ranks count 0 and 5."""
    x, y = rows(12)
    counted = np.arange(12) >= 7
    model = mlp()

    def mean(part):
        losses = nn.losses.cross_entropy(model(mx.array(x[part])), mx.array(y[part]))
        kept = mx.array(counted[part].astype(np.float32))
        return ((losses * kept).sum() / max(kept.sum().item(), 1)).item()

    halves = [mean(slice(0, 6)), mean(slice(6, 12))]
    assert abs(sum(halves) / 2 - mean(slice(0, 12))) > 0.1


# --- data -----------------------------------------------------------------------------------------


def test_a_loader_that_draws_its_seed_has_rank_0s_on_all_ranks(two):
    assert two["loader"][0] == two["loader"][1]
    assert two["loader"][0]["state"]["epoch"] == 2
    assert two["loader"][0]["state"]["samples_consumed"] == 0


def test_ranks_without_samples_take_part_until_all_have_ended(two):
    assert two["uneven_joined"][0]["step"] == two["uneven_joined"][1]["step"] == 20


def test_with_uneven_stop_all_end_with_the_first(two):
    assert two["uneven_stopped"][0]["step"] == two["uneven_stopped"][1]["step"] == 14


def test_uneven_batches_fill_windows_together(two):
    assert two["accumulated_uneven"][0]["updates"] == 4  # windows of 3 and 2 batches, twice


def test_own_batches_are_evaluated_as_one_set(two):
    x, y = rows(20)
    expected = rank_cases.trainer_of().evaluate((x, y), verbose=0)
    assert_close({k: two["own_lists"][0][k] for k in expected}, expected)
    outputs = rank_cases.trainer_of().predict(x, verbose=0)
    # Batch 0 of rank 0, batch 0 of rank 1, batch 1 of rank 0, ...
    np.testing.assert_allclose(two["own_lists"][0]["outputs"], outputs, atol=1e-6)


def test_each_row_is_counted_once(two, three):
    for found in (two, three):
        matrix = np.array(found["evaluation"][0]["confusion_matrix"])
        assert matrix.sum() == 101


def test_predictions_come_in_batches_of_all_ranks(two):
    assert two["prediction"][0]["batches"] == [10] * 10 + [1]


# --- randomness and statistics --------------------------------------------------------------------


def test_every_rank_has_dropout_of_its_own_that_can_be_repeated(two):
    first, second = two["dropout"]
    assert first[0][0] != second[0][0]
    for found in (first, second):
        assert found[0] == found[1] == found[2]  # the last logs less often
        masks, _ = found[0]
        assert masks[0] != masks[1]


def test_rank_0_draws_what_one_process_draws(two, tmp_path):
    [(_, key), *_] = rank_cases.CASES["dropout"](tmp_path)
    assert two["dropout"][0][0][1] == two["dropout"][1][0][1] == key


def test_a_key_is_a_function_of_key_rank_and_window():
    keys = {tuple(folded([1, 2], rank, window)) for rank in range(3) for window in range(5)}
    assert len(keys) == 15
    assert folded([1, 2], 1, 0) == folded([1, 2], 1, 0) != folded([2, 2], 1, 0)


def test_running_statistics_are_averaged_by_weight(two):
    x, _ = rows(9)
    means = [x[:5].mean(0), x[5:].mean(0)]
    expected = 0.1 * (5 * means[0] + 4 * means[1]) / 9
    found = two["batch_norm"][0]["layers.0.running_mean"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_start_from_rank_0s_with_a_warning(two):
    for found in two["other_weights"]:
        assert found["weights"] == weights(mlp(seed=0))
        assert any("rank 1 were different" in text for text in found["warnings"])


# --- decisions ------------------------------------------------------------------------------------


def test_a_stop_that_one_rank_asks_for_is_everybodys_after_the_next_update(two):
    for found in two["stop_on_one_rank"]:
        assert (found["step"], found["stopped_by"]) == (5, "enough")


def test_a_stop_between_epochs_is_heard_there(two):
    for found in two["stop_between_epochs"]:
        assert found["step"] == 18
        assert len(found["history"]["loss"]) == 2


def test_nan_on_one_rank_is_the_same_error_at_the_same_step(two):
    assert two["nan_raises"] == [{"step": 3, "done": 3}] * 2


def test_sigterm_to_one_rank_ends_all_after_the_next_step(tmp_path):
    processes = start(2, [rank_cases.__file__, tmp_path, "terminated"], tmp_path)
    assert end(processes) == [143, 143]
    found = [path.name for path in (tmp_path / "terminated" / "run").iterdir()]
    assert found == ["step-00000008"]


def test_ranks_that_do_different_things_are_told_so(two):
    for found in two["out_of_step"]:
        assert found["type"] == "DistributedError"
        assert "not at the same place" in found["text"]


@pytest.mark.parametrize(
    ("name", "rank"), [("saved_by_rank_0_alone", 0), ("evaluated_by_rank_1_alone", 1)]
)
def test_what_one_rank_does_alone_in_a_callback_ends_all_and_says_why(name, rank, tmp_path):
    found = run_cases(2, [name], tmp_path)[name]
    assert found[rank]["type"] == "DistributedError"
    assert (
        "All ranks must call fit, evaluate, predict, save and load together" in found[rank]["text"]
    )
    assert found[1 - rank]["type"] in ("PeerError", "DistributedError")


def test_one_rank_may_predict_a_batch_by_itself(two, tmp_path):
    first, second = two["own_predictions"]
    assert first["history"] == second["history"]
    assert (first["shapes"], second["shapes"]) == ([], [[3, 4]] * 6)


def test_waiting_is_told_from_sending_and_the_slow_rank_is_named(two):
    first, second = two["watched"]
    assert first["own_wait_ms"] > second["own_wait_ms"]  # 50 ms and none, on an idle machine
    assert first["straggler"] == second["straggler"] == [1.0, 1.0]
    assert second["printed"] == ""
    parameters, header, logs = 8 * 16 + 16 + 16 * 4 + 4, 12, 32
    assert first["mb"][1] == pytest.approx(4e-6 * (parameters + header + logs), rel=0.1)


def test_the_advice_names_what_takes_the_time():
    monitor = SyncMonitor()
    monitor.share, monitor.wait_ms, monitor.transfer_ms, monitor.straggler = 0.4, 30.0, 2.0, 3
    assert "40% of a step, 30.0 ms of it waiting for rank 3" in monitor.advice()
    monitor.transfer_ms, monitor.mb = 50.0, 12.5
    assert "50.0 ms of it sending 12.5 MB" in monitor.advice()


def test_watching_sends_no_more_in_a_step(two):
    assert two["watched"][0]["collectives"] == 2  # one message at the epoch's end


# --- messages -------------------------------------------------------------------------------------


def test_gradients_are_sent_once_an_update_whatever_the_accumulation(two):
    eight, two_updates = two["one_sum_an_update"][0]
    assert eight - two_updates == 6 * 2  # a header and one bucket each


def test_gradients_are_summed_in_place_in_one_copy_of_them(two):
    for found in two["bytes_of_a_sum"]:
        assert found["share"] < 1.1
        assert found["sums"] == {str(i): 2.0 * i for i in range(4)}
        assert found["kept"] == 3.0  # what the caller holds is not touched


def test_a_window_that_was_saved_half_full_has_the_gradients_of_all_ranks(two):
    for found in two["saved_in_a_window"]:
        whole, resumed = found["whole"], found["resumed"]
        assert (resumed["step"], resumed["updates"]) == (whole["step"], whole["updates"])
        assert_close(resumed["weights"], whole["weights"], tolerance=1e-6)
        assert_close(resumed["history"], whole["history"], tolerance=1e-6)


def test_running_statistics_are_saved_half_way_as_those_of_all_ranks(two):
    found = two["statistics_saved_in_a_window"]
    own = [np.array(each["own"]) for each in found]
    assert np.abs(own[0] - own[1]).max() > 1e-3
    for each in found:
        np.testing.assert_allclose(each["saved"], (5 * own[0] + 4 * own[1]) / 9, atol=1e-6)
        assert_close(each["resumed"]["weights"], each["whole"]["weights"], tolerance=1e-6)
        assert_close(each["resumed"]["history"], each["whole"]["history"], tolerance=1e-6)


def test_what_is_fetched_meanwhile_changes_no_bit(two):
    for found in two["overlapped"]:
        assert found == {"same": True, "overlaps": mx.default_device() == mx.cpu}


def test_half_precision_halves_the_bytes_and_keeps_the_digits_it_can(two):
    found = two["half_precision_sums"][0]
    exact = found["None"]
    for dtype in ("bfloat16", "float16"):
        for name, value in found[dtype]["weights"].items():
            before = np.array(weights(mlp())[name])
            change, expected = np.array(value) - before, exact["weights"][name] - before
            assert 0 < np.linalg.norm(change - expected) < 6e-3 * np.linalg.norm(expected)
    gradients = 4 * sum(np.size(value) for value in exact["weights"].values())
    assert exact["bytes"] - found["bfloat16"]["bytes"] == gradients // 2


def test_two_ranks_get_the_same_bits_in_buckets_of_any_size(two):
    found = list(two["buckets"][0].values())
    assert all(other == found[0] for other in found)


# --- files ----------------------------------------------------------------------------------------


def test_only_rank_0_writes(two):
    first, second = two["files"]
    assert second["opened"] == []
    assert len(first["opened"]) > 10
    assert not [name for name in first["names"] if ".tmp" in name]
    assert sum("tfevents" in name for name in first["names"]) == 3
    assert [first["same"], second["same"]] == [True, True]


def test_a_failed_save_is_the_same_error_on_all_ranks(two):
    for found in two["full_disk"]:
        kinds = [error["type"] for error in found[:5]]
        assert kinds == ["CheckpointWriteError"] * 4 + ["CheckpointError"]


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path):
    parts = [run_cases(2, ["elastic"], tmp_path)["elastic"]]
    parts += [[rank_cases.CASES["elastic"](tmp_path / "elastic")]]
    parts += [run_cases(3, ["elastic"], tmp_path)["elastic"]]
    whole = tmp_path / "whole"
    expected = [rank_cases.CASES["elastic"](whole) for _ in range(3)]
    seen = [
        sorted(row for share in shares for row in share)
        for part in parts
        for shares in zip(*(rank["seen"] for rank in part), strict=True)
    ]
    assert seen == [batch for part in expected for batch in part["seen"]]
    for key in ("updates", "rate", "weights"):
        assert_close(parts[2][0][key], expected[2][key], key)
    assert parts[2][0]["updates"] == 15
    assert_close(parts[2][0]["loss"], expected[2]["loss"])
    text = "".join(p.read_text() for p in (tmp_path / "elastic").rglob("state.json"))
    assert "rank" not in text


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "zero9"}, "strategy='zero9'"),
        ({"uneven": "drop"}, "uneven='drop'"),
        ({"sync": {"timeout": 3}}, "expected a SyncPolicy"),
    ],
)
def test_arguments_are_checked_at_construction(options, text):
    with pytest.raises(ConfigurationError, match=text):
        DistributedTrainer(mlp(), optim.SGD(0.1), "mse", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"reduce_dtype": "int4"},
        {"bucket_mb": -1},
        {"timeout": 0},
        {"init_timeout": "soon"},
        {"check_every": -1},
    ],
)
def test_a_sync_policy_is_checked_at_construction(options):
    [name] = options
    with pytest.raises(ConfigurationError, match=name):
        SyncPolicy(**options)


def test_a_strategy_is_a_name_or_an_object():
    trainer = DistributedTrainer(mlp(), optim.SGD(0.1), "mse", strategy=DataParallel())
    assert (trainer.rank, trainer.size) == (0, 1)


def test_a_rank_without_a_size_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(ConfigurationError, match="rank 1 of None"):
        DistributedTrainer(mlp(), optim.SGD(0.1), "mse")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_of_a_loader_are_its_batches(size):
    whole = list(DataLoader(np.arange(1003), batch_size=40, shuffle=True, seed=3))
    shares = [
        list(DataLoader(np.arange(1003), 40, shuffle=True, seed=3, num_replicas=size, rank=rank))
        for rank in range(size)
    ]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
