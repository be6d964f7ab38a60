"""The error family, and how MLX's texts become typed errors."""

import pickle
import subprocess
import sys

import pytest
from toys import Do, raising, ramp, trainer_of

from mlx_fit import errors
from mlx_fit.errors import (
    CheckpointMismatchError,
    ConfigurationError,
    DataError,
    DeviceError,
    MlxFitError,
    NonFiniteLossError,
    OutOfMemoryError,
    Preempted,
    UnknownMonitorError,
    from_runtime_error,
)

OUT_OF_MEMORY = {
    "[metal::malloc] Attempting to allocate 9000 bytes which is greater than the maximum allowed "
    "buffer size of 4000 bytes.": (9000, 4000),
    "[malloc] Unable to allocate 123 bytes.": (123, None),
    "[malloc_or_wait] Unable to allocate 123 bytes.": (123, None),
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": (None, None),
    "cudaMallocAsync(&data, size, stream) failed: out of memory": (None, None),
    "[metal::malloc] Resource limit (499000) exceeded.": (None, None),
}
DEVICE_FAULTS = [
    f"[METAL] Command buffer execution failed: {text}"
    for text in (
        "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
        "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
        "Internal Error (0000000e:Internal Error)",
        "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPU...)",
    )
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_an_allocation_failure_is_out_of_memory_with_its_numbers(text):
    found = from_runtime_error(RuntimeError(text), batch_size=32)
    assert isinstance(found, OutOfMemoryError)
    assert isinstance(found, MemoryError)
    assert (found.needed_bytes, found.limit_bytes) == OUT_OF_MEMORY[text]
    assert found.batch_size == 32
    assert found.suggestion in str(found)


def test_too_many_buffers_have_a_remedy_of_their_own():
    buffers = from_runtime_error(RuntimeError("[metal::malloc] Resource limit (499000) exceeded."))
    assert "fewer batch shapes" in buffers.suggestion
    assert "batch_size" not in buffers.suggestion


@pytest.mark.parametrize("text", DEVICE_FAULTS)
def test_a_device_fault_is_a_device_error(text):
    found = from_runtime_error(RuntimeError(text))
    assert type(found) is DeviceError
    assert isinstance(found, RuntimeError)


@pytest.mark.parametrize(
    "text",
    ["out of memory", "my [malloc] Unable to allocate 3 bytes.", "CUDA is nice", ""]
    + ["[matmul] Last dimension of first input", "I ran out of memory: cudaMallocAsync"],
)
def test_a_users_message_that_mentions_memory_passes(text):
    assert from_runtime_error(RuntimeError(text)) is None


def test_subclasses_and_other_types_pass():
    class Mine(RuntimeError):
        pass

    text = "[malloc] Unable to allocate 123 bytes."
    assert from_runtime_error(Mine(text)) is None
    assert from_runtime_error(ValueError(text)) is None
    assert from_runtime_error(MemoryError(text)) is not None


@pytest.mark.parametrize("text", [*OUT_OF_MEMORY, *DEVICE_FAULTS])
def test_fit_raises_the_typed_error_from_mlxs(text):
    cause, seen = RuntimeError(text), []
    watch = Do("on_exception", lambda run: seen.append(run))
    with pytest.raises((OutOfMemoryError, DeviceError)) as caught:
        trainer_of().fit(
            ramp(), callbacks=[Do("on_train_batch_end", raising(cause)), watch], verbose=0
        )
    assert caught.value.__cause__ is cause
    assert len(seen) == 1


def test_every_error_is_of_the_family_and_of_its_builtin_kind():
    kinds = {
        "ConfigurationError": ValueError,
        "DataError": ValueError,
        "DeviceError": RuntimeError,
        "OutOfMemoryError": MemoryError,
        "NonFiniteLossError": ArithmeticError,
        "CheckpointError": OSError,
        "ResumeError": RuntimeError,
        "Preempted": SystemExit,
        "UnknownMonitorError": errors.ConfigurationError,
        "CheckpointWriteError": errors.CheckpointError,
        "DistributedError": errors.DeviceError,
    }
    for name, kind in kinds.items():
        assert issubclass(getattr(errors, name), (MlxFitError,))
        assert issubclass(getattr(errors, name), kind)
    assert all(
        issubclass(getattr(errors, n), MlxFitError) for n in errors.__all__ if n[0].isupper()
    )


def test_errors_carry_their_facts():
    where = DataError("no field", path="a.jsonl", line=3, column=1, field="text", index=2)
    assert str(where) == "a.jsonl:3:1: no field"
    assert (where.path, where.line, where.field, where.index) == ("a.jsonl", 3, "text", 2)
    monitor = UnknownMonitorError("val_los", ["mae", "loss"], "EarlyStopping")
    assert monitor.available == ["loss", "mae"]
    assert "EarlyStopping monitors 'val_los'" in str(monitor)
    assert isinstance(monitor, ConfigurationError)
    mismatch = CheckpointMismatchError("x", missing=["a"], extra=["b"])
    assert (mismatch.missing, mismatch.extra, mismatch.misshapen) == (["a"], ["b"], {})
    assert NonFiniteLossError("x", step=3, epoch=1, value=float("inf")).step == 3


def test_preempted_is_an_exit_with_code_143():
    error = Preempted("stopped", step=7)
    assert (error.code, error.step, str(error)) == (143, 7, "stopped")
    code = "from mlx_fit.errors import Preempted; raise Preempted()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 143


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownMonitorError("val_los", ["val_loss"], "EarlyStopping"),
        errors.DataError("bad", path="a.jsonl", line=3),
        errors.OutOfMemoryError("full", needed_bytes=3, suggestion="less"),
        errors.NonFiniteLossError("nan", step=3, epoch=0, value=float("inf")),
        errors.CheckpointMismatchError("other", missing=["a"], misshapen={"b": ((1,), (2,))}),
        errors.PeerError("gone", rank=1, step=2, type="ValueError", message="boom"),
        errors.Preempted(step=4),
    ],
)
def test_an_error_survives_pickling_with_its_facts(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert getattr(copy, "code", None) == getattr(error, "code", None)
