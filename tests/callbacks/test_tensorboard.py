"""TensorBoard files, read back record by record."""

import itertools
import json
import resource
import signal
import struct
import threading
import time
from collections import defaultdict

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from toys import Do, raising, ramp, rows_of_ones, trainer_of

from mlx_fit import CausalLM, ConfigurationError, GradientMonitor, TensorBoard, Trainer, metrics
from mlx_fit.batch import TextBatch
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


def folders_of(path):
    return {p.name for p in path.iterdir()} - {"hparams"}


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
    assert folders_of(tmp_path) == {"train"}


def test_several_sets_have_their_own_folders(tmp_path):
    fit(TensorBoard(tmp_path), {"a": ramp(1), "b": ramp(2)})
    assert folders_of(tmp_path) == {"train", "validation_a", "validation_b"}
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


def test_what_was_written_outlives_a_process_that_is_killed_at_once(tmp_path):
    seen = []

    def look(_):  # nothing is closed yet
        seen.append(curves(tmp_path / "train"))

    looks = [Do("on_train_batch_begin", look), Do("on_epoch_begin", look, index=1)]
    fit([TensorBoard(tmp_path, update_freq=1), *looks])
    between = seen.pop(5)
    assert {"epoch_loss", "perf/step_time_ms"} <= between.keys()
    assert [len(found.get("batch_loss", [])) for found in seen] == list(range(10))


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path):
    """As root there is no folder that cannot be written: a small limit on files stands in."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    shrink = Do(
        "on_epoch_begin", lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1])), 1
    )
    try:
        with pytest.warns(UserWarning, match="cannot be written.*Training goes on without it"):
            history = fit([TensorBoard(tmp_path, update_freq=1, hparams=False), shrink], epochs=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(history.history["loss"]) == 3
    assert "epoch_loss" in curves(tmp_path / "train")


def test_the_values_of_an_epoch_are_one_event_that_tensorboards_own_reader_takes(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    fit(TensorBoard(tmp_path, hparams=False))
    (path,) = (tmp_path / "train").iterdir()
    head, *events = EventFileLoader(str(path)).Load()  # raises for a wrong checksum
    assert head.file_version == "brain.Event:2"
    assert [(e.step, len(e.summary.value) > 1) for e in events] == [
        (i // 2, True) for i in range(4)
    ]


def test_speed_and_memory_are_written_by_epoch(tmp_path):
    trainer = trainer_of(metrics=[])
    trainer.fit(rows_of_ones(), epochs=2, callbacks=TensorBoard(tmp_path), verbose=0)
    train = curves(tmp_path / "train")
    tags = ["perf/step_time_ms", "perf/examples_per_second", "perf/peak_memory_mib"]
    more = {"perf/active_memory_mib", "perf/cache_memory_mib", "perf/data_wait_ms"}
    assert {*tags, *more} == set(train) - without_perf(train)
    for tag in tags:
        assert all(value > 0 for _, value in train[tag])
    for (_, step_ms), (_, rate) in zip(train[tags[0]], train[tags[1]], strict=True):
        assert rate == pytest.approx(4 / (step_ms / 1e3), rel=1e-3)


def test_unknown_batch_sizes_give_no_rate_of_examples(tmp_path):
    fit(TensorBoard(tmp_path))
    assert "perf/examples_per_second" not in curves(tmp_path / "train")


def test_of_a_language_model_the_rate_is_of_tokens_that_count(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    trainer = Trainer(model, optim.SGD(0.1), objective=CausalLM())
    tokens, weights = np.ones((2, 5), np.int32), np.float32([[1, 1, 1, 0, 0]] * 2)
    batches = [TextBatch(tokens, tokens, weights, tokens)] * 3
    trainer.fit(batches, callbacks=TensorBoard(tmp_path), verbose=0)
    train = curves(tmp_path / "train")
    [(_, step_ms)], [(_, rate)] = train["perf/step_time_ms"], train["perf/tokens_per_second"]
    assert rate == pytest.approx(6 / (step_ms / 1e3), rel=1e-3)


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
    for path in itertools.chain(*(tmp_path.glob(f"{name}*/events*") for name in ("t", "v"))):
        for record in records(path):
            for value in Event.FromString(record).summary.value:
                assert value.WhichOneof("value") == "simple_value"


@pytest.mark.parametrize("update_freq", ["steps", 0, -1, 1.5, True])
def test_a_wrong_frequency_is_named(update_freq):
    with pytest.raises(ConfigurationError, match=r"update_freq=.*expected 'epoch', 'batch'"):
        TensorBoard(update_freq=update_freq)


# --- histograms, pictures, texts ------------------------------------------------------------------


def summaries(folder):
    """(tag, step, value) of everything in a folder."""
    found = []
    for path in sorted(folder.glob("events*")):
        for record in records(path):
            event = Event.FromString(record)
            found += [(value.tag, event.step, value) for value in event.summary.value]
    return found


@pytest.mark.parametrize(("freq", "steps"), [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3])])
def test_histograms_come_every_so_many_epochs(tmp_path, freq, steps):
    fit(TensorBoard(tmp_path, histogram_freq=freq), epochs=4)
    histograms = [s for s in summaries(tmp_path / "train") if s[0] == "weights/weight"]
    assert [step for _, step, _ in histograms] == steps
    for _, _, value in histograms:
        assert value.histo.num == 12


def test_histograms_are_of_finite_values_of_any_dtype(tmp_path):
    board = TensorBoard(tmp_path)
    board.add_histogram("half", mx.array([1.0, 2.0, float("nan")], mx.bfloat16), 3)
    board.add_histogram("none", np.array([np.inf]), 3)
    ((tag, step, value),) = summaries(tmp_path / "train")
    assert (tag, step, value.histo.num, value.histo.max) == ("half", 3, 2, 2)


def test_users_may_write_in_a_fit_and_outside_of_one(tmp_path):
    board = TensorBoard(tmp_path)
    board.add_text("note", "before")
    in_fit = Do("on_epoch_end", lambda _: board.add_scalar("own", np.float32(0.5)))
    fit([in_fit, board], num_batches=3)
    board.add_image("after", np.zeros((2, 3)), step=7)
    found = {(tag, step) for tag, step, _ in summaries(tmp_path / "train")}
    expected = {("note/text_summary", 0), ("own", 3), ("own", 6), ("after", 7)}
    assert expected <= found
    assert curves(tmp_path / "train")["own"] == [(3, 0.5), (6, 0.5)]


def test_a_confusion_matrix_is_a_picture_and_norms_are_curves(tmp_path):
    data = (np.ones((6, 4), np.float32), np.arange(6) % 3)
    trainer = trainer_of(loss="cross_entropy", metrics=[metrics.ConfusionMatrix()])
    callbacks = [GradientMonitor(), TensorBoard(tmp_path)]
    trainer.fit(data, data, callbacks=callbacks, verbose=0)
    for folder in ("train", "validation"):
        kinds = {tag: v.WhichOneof("value") for tag, _, v in summaries(tmp_path / folder)}
        assert kinds["epoch_confusion_matrix"] == "image"
    assert len(curves(tmp_path / "train")["epoch_layer_grad_norms/weight"]) == 1


def test_a_graph_cannot_be_had():
    TensorBoard(write_graph=False)
    with pytest.raises(ConfigurationError, match="MLX keeps no graph"):
        TensorBoard(write_graph=True)


# --- hyperparameters ------------------------------------------------------------------------------


def hparams_of(folder):
    found = {}
    for tag, _, value in summaries(folder / "hparams"):
        if tag.startswith("_hparams_/"):
            data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            found[tag.removeprefix("_hparams_/")] = getattr(data, data.WhichOneof("data"))
    return found


def test_hyperparameters_and_final_metrics_are_written(tmp_path):
    board = TensorBoard(tmp_path, hparams={"width": 4, "kind": "toy", "tied": False})
    history = fit(board, ramp(1))
    found = hparams_of(tmp_path)
    values = {
        k: getattr(v, v.WhichOneof("kind")) for k, v in found["session_start_info"].hparams.items()
    }
    assert values.items() >= {"width": 4, "kind": "toy", "tied": False, "epochs": 2}.items()
    assert (values["model"], values["optimizer"]) == ("Ones", "SGD")
    assert values["learning_rate"] == pytest.approx(0.01)
    final = curves(tmp_path / "hparams")
    assert {tag: value for tag, [(_, value)] in final.items() if tag.startswith("final")} == {
        f"final_{key}": pytest.approx(values[-1]) for key, values in history.history.items()
    }
    assert found["session_end_info"].status == 1


def test_a_failed_run_is_marked_as_failed_and_hparams_can_be_left_out(tmp_path):
    breaks = Do("on_epoch_begin", raising(OSError("x")), 1)
    with pytest.raises(OSError, match="x"):
        fit([TensorBoard(tmp_path / "a"), breaks])
    assert hparams_of(tmp_path / "a")["session_end_info"].status == 2
    fit(TensorBoard(tmp_path / "b", hparams=False))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["train"]


# --- resume ---------------------------------------------------------------------------------------


def test_a_resumed_run_draws_one_curve(tmp_path):
    states, first = [], TensorBoard(tmp_path, 1, 1)
    keep = Do("on_train_batch_end", lambda _: states.append(json.dumps(first.state_dict())), 2)
    killed = Do("on_epoch_begin", raising(OSError("killed")), 3)
    with pytest.raises(OSError, match="killed"):
        fit([first, keep, killed], ramp(1), epochs=5)
    second = TensorBoard(tmp_path, 1, 1)  # from the checkpoint in the middle of the second epoch
    load = Do("on_train_begin", lambda _: second.load_state_dict(json.loads(states[1])))
    fit([second, load], ramp(1), epochs=3, initial_epoch=1, num_batches=5)
    train, validation = curves(tmp_path / "train"), curves(tmp_path / "validation")
    assert [step for step, _ in train["epoch_loss"]] == [0, 1, 2]
    assert [step for step, _ in train["perf/step_time_ms"]] == [0, 1, 2]
    assert [step for step, _ in train["batch_loss"]] == list(range(1, 19))
    assert [step for step, _ in validation["epoch_loss"]] == [0, 1, 2]
    histograms = [s for s in summaries(tmp_path / "train") if s[0] == "weights/weight"]
    assert [step for _, step, _ in histograms] == [0, 1, 2]


def test_initial_epoch_continues_the_curves_as_well(tmp_path):
    fit(TensorBoard(tmp_path), epochs=4)
    fit(TensorBoard(tmp_path), epochs=5, initial_epoch=2)
    assert [step for step, _ in curves(tmp_path / "train")["epoch_loss"]] == [0, 1, 2, 3, 4]


def test_half_a_record_of_a_killed_process_is_dropped_and_other_files_stay(tmp_path):
    fit(TensorBoard(tmp_path), epochs=2)
    (path,) = (tmp_path / "train").glob("events*")
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "train" / "notes.txt").write_text("mine")
    board = TensorBoard(tmp_path)
    state = {"num_epochs": 2, "num_batches": 10, "step": 10}
    fit([board, Do("on_train_begin", lambda _: board.load_state_dict(state))], epochs=1)
    assert "epoch_loss" in curves(tmp_path / "train")
    assert (tmp_path / "train" / "notes.txt").read_text() == "mine"


def test_two_boards_in_one_fit_both_write_everything(tmp_path):
    boards = [TensorBoard(tmp_path / "a", update_freq=1), TensorBoard(tmp_path / "b")]
    fit(boards, ramp(1))
    assert "batch_loss" in curves(tmp_path / "a" / "train")
    assert (
        curves(tmp_path / "a" / "train")["epoch_loss"]
        == curves(tmp_path / "b" / "train")["epoch_loss"]
    )
    fit([TensorBoard(tmp_path / "c"), TensorBoard(tmp_path / "c")])
    assert len(curves(tmp_path / "c" / "train")["epoch_loss"]) == 4


def test_hooks_that_a_subclass_adds_are_called(tmp_path):
    seen = []

    class Own(TensorBoard):
        def on_train_batch_end(self, batch, logs):
            seen.append(batch)

    fit(Own(tmp_path), num_batches=3, epochs=1)
    assert seen == [0, 1, 2]


def test_the_wait_for_data_is_in_the_curves(tmp_path):
    def slow():
        for batch in ramp(4):
            time.sleep(0.02)
            yield batch

    trainer_of().fit(slow, callbacks=TensorBoard(tmp_path), verbose=0)
    ((_, wait),) = curves(tmp_path / "train")["perf/data_wait_ms"]
    assert 19 < wait < 100


@pytest.mark.parametrize(
    "options",
    [{"histogram_freq": -1}, {"histogram_freq": "1"}, {"hparams": 3}, {"hparams": {"a": [1]}}],
)
def test_a_wrong_argument_is_named(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        TensorBoard(**options)
