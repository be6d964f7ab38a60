"""TensorBoard files, read back record by record."""

import itertools
import struct
import threading
from collections import defaultdict

import pytest
from tensorboardX.proto.event_pb2 import Event
from toys import Do, raising, ramp, rows_of_ones, trainer_of

from mlx_fit import ConfigurationError, TensorBoard
from mlx_fit.logs import Values


def records(path):
    """The records of a TFRecord file: length, checksum, data, checksum."""
    data, position = path.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield data[position + 12 : position + 12 + length]
        position += length + 16


def curves(folder):
    """tag -> [(step, value)] over all files of a folder."""
    found = defaultdict(list)
    for path in sorted(folder.glob("events*"), key=lambda p: p.stat().st_mtime_ns):
        for record in records(path):
            event = Event.FromString(record)
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
    return dict(found)


def fit(board, val=None, num_batches=5, trainer=None, **options):
    options = {"epochs": 2, "callbacks": board, "verbose": 0} | options
    return (trainer or trainer_of(metrics=[])).fit(ramp(num_batches), val, **options)


def without_perf(tags):
    return {tag for tag in tags if not tag.startswith("perf/")}


def test_the_tags_are_kerass(tmp_path):
    history = fit(TensorBoard(tmp_path), ramp(1))
    train, validation = curves(tmp_path / "train"), curves(tmp_path / "validation")
    assert without_perf(train) == {"epoch_loss", "epoch_learning_rate"}
    assert set(validation) == {"epoch_loss", "evaluation_loss_vs_iterations"}
    values = [value for _, value in train["epoch_loss"]]
    assert values == pytest.approx(history.history["loss"])
    assert [step for step, _ in train["epoch_loss"]] == [0, 1]
    assert [step for step, _ in validation["epoch_loss"]] == [0, 1]
    assert [step for step, _ in validation["evaluation_loss_vs_iterations"]] == [5, 10]


def test_without_validation_there_is_no_validation_folder(tmp_path):
    fit(TensorBoard(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["train"]


def test_several_sets_have_their_own_folders(tmp_path):
    fit(TensorBoard(tmp_path), {"a": ramp(1), "b": ramp(2)})
    assert {p.name for p in tmp_path.iterdir()} == {"train", "validation_a", "validation_b"}
    assert "epoch_loss" in curves(tmp_path / "validation_b")
    assert "epoch_a_loss" not in curves(tmp_path / "train")


@pytest.mark.parametrize(
    ("update_freq", "steps"),
    [("batch", range(1, 11)), (1, range(1, 11)), (3, [3, 6, 9]), ("epoch", [])],
)
def test_batch_values_come_every_so_many_batches_over_epochs(tmp_path, update_freq, steps):
    fit(TensorBoard(tmp_path, update_freq=update_freq))
    written = curves(tmp_path / "train").get("batch_loss", [])
    assert [step for step, _ in written] == list(steps)


def test_the_count_of_batches_starts_anew_with_each_fit(tmp_path):
    board = TensorBoard(tmp_path, update_freq=3)
    for _ in range(2):
        fit(board, epochs=1, num_batches=4)
    assert [step for step, _ in curves(tmp_path / "train")["batch_loss"]] == [3, 3]


def test_batch_values_are_running_means(tmp_path):
    trainer = trainer_of(learning_rate=0.0, metrics=[])
    fit(TensorBoard(tmp_path, update_freq=1), num_batches=4, trainer=trainer, epochs=1)
    written = [value for _, value in curves(tmp_path / "train")["batch_loss"]]
    assert written == pytest.approx([0, 8, 80 / 3, 56])


@pytest.mark.parametrize(("update_freq", "reads"), [("epoch", 0), (4, 2), (1, 8)])
def test_values_are_read_from_the_device_only_where_they_are_written(
    tmp_path, monkeypatch, update_freq, reads
):
    count, read = [], Values.vector.fget
    inside = []
    watch = [
        Do("on_train_batch_begin", lambda _: inside.append(1)),
        TensorBoard(tmp_path, update_freq=update_freq),
        Do("on_train_batch_end", lambda _: inside.clear()),
    ]
    monkeypatch.setattr(
        Values,
        "vector",
        property(lambda self: (inside and self._vector is None and count.append(1), read(self))[1]),
    )
    fit(watch, num_batches=4)
    assert len(count) == reads


def test_two_writers_within_a_second_do_not_meet(tmp_path):
    for _ in range(3):
        fit(TensorBoard(tmp_path), epochs=1)
    assert len(list((tmp_path / "train").glob("events*"))) == 3
    assert len(curves(tmp_path / "train")["epoch_loss"]) == 3


def test_one_instance_serves_several_fits(tmp_path):
    board = TensorBoard(tmp_path)
    trainer = trainer_of(metrics=[])
    fit(board, ramp(1), trainer=trainer)
    fit(board, ramp(1), trainer=trainer, initial_epoch=2, epochs=4)
    assert [step for step, _ in curves(tmp_path / "train")["epoch_loss"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("breaks", [False, True])
def test_files_are_closed_and_complete_at_the_end(tmp_path, breaks):
    board = TensorBoard(tmp_path, update_freq=1)
    if breaks:
        breaking = Do("on_train_batch_end", raising(OSError("x")), index=3)
        with pytest.raises(OSError, match="x"):
            fit([board, breaking])
    else:
        fit(board)
    names = {thread.name for thread in threading.enumerate()}
    assert names <= {"MainThread", "QueueFeederThread"}  # the latter is multiprocessing's own
    written = [step for step, _ in curves(tmp_path / "train")["batch_loss"]]
    assert written == list(range(1, 5 if breaks else 11))


def test_speed_and_memory_are_written_by_epoch(tmp_path):
    trainer = trainer_of(metrics=[])
    trainer.fit(rows_of_ones(), epochs=2, callbacks=TensorBoard(tmp_path), verbose=0)
    train = curves(tmp_path / "train")
    tags = ["perf/step_time_ms", "perf/examples_per_second", "perf/peak_memory_mib"]
    assert set(tags) == set(train) - without_perf(train)
    for tag in tags:
        assert all(value > 0 for _, value in train[tag])
    for (_, step_ms), (_, rate) in zip(train[tags[0]], train[tags[1]], strict=True):
        assert rate == pytest.approx(4 / (step_ms / 1e3), rel=1e-3)


def test_unknown_batch_sizes_give_no_rate_of_examples(tmp_path):
    fit(TensorBoard(tmp_path))
    assert "perf/examples_per_second" not in curves(tmp_path / "train")


def test_evaluations_inside_epochs_are_written_by_step(tmp_path):
    fit(TensorBoard(tmp_path), ramp(1), validation_freq="2 steps", epochs=1)
    written = curves(tmp_path / "validation")["evaluation_loss_vs_iterations"]
    assert [step for step, _ in written] == [2, 4]


def test_a_folder_that_cannot_be_made_shows_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = trainer_of(metrics=[])
    with pytest.raises(OSError, match="file"):
        fit(TensorBoard(tmp_path / "file"), trainer=trainer)
    assert trainer.step == 0


def test_only_scalars_are_written(tmp_path):
    fit(TensorBoard(tmp_path), ramp(1))
    for path in itertools.chain(tmp_path.glob("*/events*")):
        for record in records(path):
            for value in Event.FromString(record).summary.value:
                assert value.WhichOneof("value") == "simple_value"


@pytest.mark.parametrize("update_freq", ["steps", 0, -1, 1.5, True])
def test_a_wrong_frequency_is_named(update_freq):
    with pytest.raises(ConfigurationError, match=r"update_freq=.*expected 'epoch', 'batch'"):
        TensorBoard(update_freq=update_freq)
