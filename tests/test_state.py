"""Weights files: whole or not at all."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import Ones, ramp, trainer_of

from mlx_fit import Trainer
from mlx_fit.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWriteError,
    ConfigurationError,
    NonFiniteLossError,
)
from mlx_fit.state import load_parameters, non_finite_names, read_arrays, write_arrays


def arrays_of(value, size=4):
    return {"a.b": mx.full((size, 3), value), "c": mx.array([value], mx.bfloat16)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint32])
def test_arrays_come_back_as_they_were(tmp_path, dtype):
    array = mx.array([[1, 2], [3, 4]], dtype)
    write_arrays(tmp_path / "w.safetensors", {"a.b": array})
    found = read_arrays(tmp_path / "w.safetensors")
    assert found["a.b"].dtype == dtype
    assert mx.array_equal(found["a.b"], array)


def test_other_libraries_can_read_the_file(tmp_path):
    from safetensors.numpy import load_file

    write_arrays(tmp_path / "w.safetensors", {"a": mx.arange(6).reshape(2, 3)})
    assert np.array_equal(load_file(tmp_path / "w.safetensors")["a"], np.arange(6).reshape(2, 3))


def test_parent_folders_are_made_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "folder" / "w.safetensors"
    write_arrays(path, arrays_of(1.0))
    write_arrays(path, arrays_of(2.0))
    assert os.listdir(path.parent) == ["w.safetensors"]
    assert read_arrays(path)["a.b"][0, 0].item() == 2.0


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "w.safetensors", arrays_of(1.0))
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_was_read_does_not_change_when_the_file_does(tmp_path):
    path = tmp_path / "w.safetensors"
    write_arrays(path, arrays_of(1.0, size=1000))
    found = read_arrays(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place
    assert mx.all(found["a.b"] == 1.0).item()


def test_a_full_disk_raises_and_keeps_the_former_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_arrays(path, arrays_of(1.0))
    before = path.read_bytes()
    # A limit on file sizes fails a write half-way, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError, match="could not be written") as caught:
            write_arrays(path, arrays_of(2.0, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.path == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_raises_and_keeps_the_former_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_arrays(path, arrays_of(1.0))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointWriteError, match="Permission denied"):
            write_arrays(path, arrays_of(2.0))
    finally:
        tmp_path.chmod(0o755)
    assert read_arrays(path)["a.b"][0, 0].item() == 1.0


def test_a_folder_that_cannot_be_made_raises(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointWriteError):
        write_arrays(tmp_path / "file" / "w.safetensors", arrays_of(1.0))


def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path):
    code = """
        import sys, itertools
        import mlx.core as mx
        from pathlib import Path
        from mlx_fit.state import write_arrays
        for i in itertools.count():
            write_arrays(Path(sys.argv[1]), {"w": mx.full((1000, 1000), float(i))})
            print(i, flush=True)
    """
    path = tmp_path / "w.safetensors"
    for attempt in range(3):
        command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.01 + 0.003 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        weights = read_arrays(path)["w"]
        assert mx.all(weights == weights[0, 0]).item()
        assert [p.name for p in tmp_path.glob("*.safetensors")] == ["w.safetensors"]


@pytest.mark.parametrize("content", [b"", b"not a weights file at all", None])
def test_an_unreadable_file_is_a_checkpoint_error(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is None:
        write_arrays(path, arrays_of(1.0, size=1000))
        content = path.read_bytes()[:-500]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_arrays(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_arrays(tmp_path / "other.safetensors")


def test_loading_takes_all_or_nothing():
    model = nn.Linear(4, 3)
    before = mx.array(model.weight)
    arrays = {"weight": mx.zeros((3, 4)), "bais": mx.zeros((3,))}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_parameters(model, arrays, strict=True, source="The file")
    assert (caught.value.missing, caught.value.extra) == (["bias"], ["bais"])
    assert "missing bias; extra bais" in str(caught.value)
    assert mx.array_equal(model.weight, before)


def test_not_strict_loads_what_fits_by_name():
    model = nn.Linear(4, 3)
    load_parameters(model, {"weight": mx.zeros((3, 4))}, strict=False, source="The file")
    assert mx.all(model.weight == 0).item()


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_never_loaded(strict):
    model = nn.Linear(4, 3)
    arrays = {"weight": mx.zeros((4, 3)), "bias": mx.zeros((3,))}
    with pytest.raises(CheckpointMismatchError, match=r"weight has shape \(4, 3\)") as caught:
        load_parameters(model, arrays, strict=strict, source="The file")
    assert caught.value.misshapen == {"weight": ((4, 3), (3, 4))}
    assert not mx.all(model.bias == 0).item()


def test_the_models_dtype_stays():
    model = nn.Linear(4, 3)
    load_parameters(
        model, {"weight": mx.zeros((3, 4), mx.bfloat16)}, strict=False, source="The file"
    )
    assert model.weight.dtype == mx.float32


def test_non_finite_arrays_are_named():
    model, optimizer = Ones(), optim.Adam(0.1)
    optimizer.init(model.parameters())
    assert non_finite_names(model, optimizer) == []
    model.weight = mx.array([[1.0, float("nan")]])
    optimizer.state["weight"]["m"] = mx.array([float("inf")])
    assert non_finite_names(model, optimizer) == ["weight", "optimizer.weight.m"]


def test_non_finite_weights_are_never_written(tmp_path):
    trainer, path = trainer_of(), tmp_path / "w.safetensors"
    trainer.save_weights(path)
    trainer.model.weight = trainer.model.weight * float("nan")
    with pytest.raises(NonFiniteLossError, match="weight"):
        trainer.save_weights(path)
    assert mx.all(read_arrays(path)["weight"] == 1).item()


def test_weights_load_into_a_fresh_model(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8), nn.Linear(8, 3))

    trained, fresh = trainer_of(model()), trainer_of(model())
    trained.fit(ramp(), verbose=0)
    trained.save_weights(tmp_path / "w.safetensors")
    fresh.load_weights(tmp_path / "w.safetensors")
    x = ramp()[1][0]
    assert np.array_equal(trained.predict(x, verbose=0), fresh.predict(x, verbose=0))


def test_another_suffix_is_refused():
    for method in (trainer_of().save_weights, trainer_of().load_weights):
        with pytest.raises(ConfigurationError, match=r"suffix '.npz'"):
            method("weights.npz")


def test_a_model_without_an_optimizer_can_be_saved(tmp_path):
    Trainer(Ones()).save_weights(tmp_path / "w.safetensors")
    assert list(read_arrays(tmp_path / "w.safetensors")) == ["weight"]
