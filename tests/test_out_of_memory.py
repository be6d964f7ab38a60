"""MLX's texts for a device that fails, wherever they appear: typed, with what is left said."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import Do, Ones, raising, ramp, trainer_of

import mlx_fit.step
from mlx_fit import DeviceError, OutOfMemoryError, Trainer
from mlx_fit.errors import from_runtime_error

MEMORY = {
    "[metal::malloc] Attempting to allocate 9000 bytes which is greater than the maximum allowed "
    "buffer size of 4000 bytes.": "allocation",
    "[malloc] Unable to allocate 123 bytes.": "allocation",
    "[malloc_or_wait] Unable to allocate 123 bytes.": "allocation",
    "cudaMallocAsync(&data, size, stream) failed: out of memory": "allocation",
    "cudaMallocManaged failed: out of memory.": "allocation",
    "cudaGraphLaunch(handle, stream) failed: out of memory": "execution",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": "execution",
    "[metal::malloc] Resource limit (499000) exceeded.": "buffers",
}
FAULTS = [
    f"[METAL] Command buffer execution failed: {text}"
    for text in (
        "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
        "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
        "Internal Error (0000000e:Internal Error)",
        "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPU...)",
    )
] + ["cudaStreamSynchronize(stream) failed: an illegal memory access was encountered"]
OTHERS = ["I ran out of memory", "see [malloc] Unable to allocate 3 bytes.", "cudaMalloc is a word"]


def kind_of(text):
    return OutOfMemoryError if text in MEMORY else DeviceError if text in FAULTS else RuntimeError


def make(**options):
    return trainer_of(seed=0, **options)


def fail_at_dispatch(text, monkeypatch):
    """While MLX traces the third batch, which has another shape."""

    def loss(outputs, targets):
        if outputs.shape[0] == 3:
            raise RuntimeError(text)
        return (outputs - targets).square().mean(-1)

    x, y = np.ones((3, 4), np.float32), np.zeros((3, 3), np.float32)
    return make(loss=loss, metrics=()), [*ramp(2), (x, y)]


def failing_eval(monkeypatch, text, number, times=1):
    """The wait for that step raises, as a failed allocation in it would."""
    evaluate, wait, calls = mx.eval, mlx_fit.step.TrainStep.wait, []

    def waiting(self):
        calls.extend([] if self._awaited is None else [1])
        if number <= len(calls) < number + times:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mx, "synchronize", raising(RuntimeError(text)))
                wait(self)
        else:
            wait(self)

    monkeypatch.setattr(mlx_fit.step.TrainStep, "wait", waiting)
    return evaluate


def fail_at_evaluation(text, monkeypatch):
    failing_eval(monkeypatch, text, 3)
    return make(), ramp(4)


def fail_late(text, monkeypatch):
    """Asynchronously: a step is started, and its failure shows when another one is waited for."""
    settle, calls = mlx_fit.step.TrainStep.settle, []

    def asynchronously(self):
        self._is_async, self._overlaps = True, False
        calls.append(1)
        if len(calls) == 4:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mx, "eval", raising(RuntimeError(text)))
                settle(self)
        settle(self)

    monkeypatch.setattr(mlx_fit.step.TrainStep, "settle", asynchronously)
    return make(), ramp(6)


@pytest.mark.parametrize("fail", [fail_at_dispatch, fail_at_evaluation, fail_late])
@pytest.mark.parametrize("text", [*MEMORY, *FAULTS, *OTHERS], ids=lambda text: text[:40])
def test_each_text_is_typed_wherever_it_appears(text, fail, monkeypatch):
    trainer, batches = fail(text, monkeypatch)
    with pytest.raises(RuntimeError if kind_of(text) is RuntimeError else kind_of(text)) as caught:
        trainer.fit(batches, verbose=0)
    assert caught.type is kind_of(text)
    if kind_of(text) is RuntimeError:
        assert str(caught.value) == text
    else:
        assert str(caught.value.__cause__) == text
        assert text.rstrip(".") in str(caught.value)


@pytest.mark.parametrize("text", MEMORY, ids=lambda text: text[:40])
def test_each_kind_of_lack_is_told_apart(text):
    found = from_runtime_error(RuntimeError(text))
    assert found.kind == MEMORY[text]
    assert ("fewer batch shapes" in found.suggestion) == (found.kind == "buffers")


EXECUTION = "cudaGraphLaunch(handle, stream) failed: out of memory"
ALLOCATIONS = [text for text, kind in MEMORY.items() if kind == "allocation"]


@pytest.mark.parametrize("fail", [fail_at_dispatch, fail_at_evaluation])
@pytest.mark.parametrize("text", [ALLOCATIONS[0], ALLOCATIONS[3]], ids=["metal", "cuda"])
def test_a_failed_allocation_leaves_a_usable_model_and_a_checkpoint(
    text, fail, monkeypatch, tmp_path
):
    trainer, batches = fail(text, monkeypatch)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit(batches, checkpoint_dir=tmp_path, checkpoint_every="1000 steps", verbose=0)
    newest = max(tmp_path.iterdir())
    assert newest.name == f"step-0000000{trainer.step}"
    assert str(newest) in str(caught.value)
    monkeypatch.undo()
    assert np.isfinite(np.array(trainer.model.weight)).all()
    left = np.array(trainer.model.weight)
    other = make(loss=trainer._objective._losses[""], metrics=trainer._objective._metrics[""])
    other.load(newest)
    np.testing.assert_array_equal(np.array(other.model.weight), left)
    history = trainer.fit(ramp(3), verbose=0)
    assert np.isfinite(history.history["loss"][0])


@pytest.mark.parametrize(
    "text",
    [
        *FAULTS,
        "[METAL] Command buffer execution failed: Insufficient "
        "Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ],
    ids=lambda text: text[41:60],
)
def test_after_a_fault_nothing_is_saved_and_the_checkpoint_to_go_on_from_is_named(
    text, monkeypatch, tmp_path
):
    trainer, batches = fail_at_evaluation(text, monkeypatch)
    with pytest.raises((DeviceError, OutOfMemoryError)) as caught:
        trainer.fit(batches, checkpoint_dir=tmp_path, checkpoint_every="1 steps", verbose=0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    assert "half updated" in str(caught.value)
    assert str(tmp_path / "step-00000002") in str(caught.value)


def test_a_late_failure_in_a_callback_is_not_saved_as_if_all_were_well(monkeypatch, tmp_path):
    """With steps in flight, what raises somewhere else may be the failure of one of them."""
    settle = mlx_fit.step.TrainStep.settle

    def asynchronously(self):
        self._is_async = True
        settle(self)

    monkeypatch.setattr(mlx_fit.step.TrainStep, "settle", asynchronously)
    watch = Do("on_train_batch_end", raising(RuntimeError(FAULTS[0])), 2)
    with pytest.raises(DeviceError, match="no checkpoint was written to go on from"):
        make().fit(
            ramp(), callbacks=watch, checkpoint_dir=tmp_path, checkpoint_every="9 steps", verbose=0
        )
    assert not list(tmp_path.glob("step-*"))


def test_without_checkpoints_the_message_says_that_all_is_whole():
    def loss(outputs, targets):
        raise RuntimeError(ALLOCATIONS[0])

    with pytest.raises(OutOfMemoryError, match="are those of step 0") as caught:
        make(loss=loss, metrics=()).fit(ramp(), verbose=0)
    assert caught.value.batch_size is None  # batches of a list have no size that is known before


def test_an_update_that_fails_is_not_split(monkeypatch, tmp_path):
    """Gradients can be redone, an update cannot."""
    settle, calls = mlx_fit.step.TrainStep.settle, []

    def failing(self):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(EXECUTION)
        settle(self)

    monkeypatch.setattr(mlx_fit.step.TrainStep, "settle", failing)
    trainer = make(on_oom="split")
    with pytest.raises(OutOfMemoryError, match="step-00000002"):
        trainer.fit(ramp(5), checkpoint_dir=tmp_path, checkpoint_every="1 steps", verbose=0)
    assert trainer.micro_batch_size == 4


def test_a_users_own_memory_error_passes_unchanged():
    class Mine(MemoryError):
        pass

    error = Mine("[malloc] Unable to allocate 3 bytes.")
    with pytest.raises(Mine) as caught:
        make().fit(ramp(), callbacks=Do("on_train_batch_end", raising(error)), verbose=0)
    assert caught.value is error


def test_training_goes_on_from_the_bits_before_a_failed_dispatch(monkeypatch):
    """The same run without the batch that failed."""

    def make_one(loss):
        mx.random.seed(0)
        return Trainer(Ones(), optim.AdamW(0.01), loss)

    def loss(outputs, targets):
        if outputs.shape[0] == 3:
            raise RuntimeError(ALLOCATIONS[0])
        return (outputs - targets).square().mean(-1)

    failed, other = make_one(loss), make_one(loss)
    x, y = np.ones((3, 4), np.float32), np.zeros((3, 3), np.float32)
    with pytest.raises(OutOfMemoryError):
        failed.fit([*ramp(2), (x, y)], verbose=0)
    failed.fit(ramp(3), verbose=0)
    other.fit(ramp(2), verbose=0)
    other.fit(ramp(3), verbose=0)
    for (name, a), (_, b) in zip(
        tree_flatten(failed.model.parameters()), tree_flatten(other.model.parameters()), strict=True
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=name)


# --- what to do after a fault ---------------------------------------------------------------------


def fault(trainer, batches, monkeypatch, number, **options):
    """The message of a fault in the ``number``-th step that is waited for."""
    with monkeypatch.context() as patch:
        failing_eval(patch, FAULTS[0], number)
        with pytest.raises(DeviceError) as caught:
            trainer.fit(batches, verbose=0, **options)
    return str(caught.value)


def test_without_a_folder_it_says_to_start_anew_with_one(monkeypatch):
    text = fault(make(), ramp(4), monkeypatch, 3)
    assert "no checkpoint was written to go on from: start with a new model" in text
    assert "with checkpoint_dir=" in text


def test_with_nothing_written_yet_it_says_to_start_anew(monkeypatch, tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": "100 steps"}
    text = fault(make(), ramp(4), monkeypatch, 3, **options)
    assert "no checkpoint was written to go on from: start with a new model" in text
    assert "checkpoint_dir" not in text


def test_the_run_that_goes_on_from_the_checkpoint_ends_as_if_nothing_had_been(
    monkeypatch, tmp_path
):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": "1 steps", "epochs": 2}
    text = fault(make(), ramp(4), monkeypatch, 4, **options)
    named = text.split("go on from ")[1].split(". ")[0].rstrip(".")
    assert named == str(tmp_path / "step-00000003")
    resumed, whole = make(), make()
    resumed.fit(ramp(4), resume=named, verbose=0, **options)
    whole.fit(ramp(4), epochs=2, verbose=0)
    np.testing.assert_array_equal(np.array(resumed.model.weight), np.array(whole.model.weight))


@pytest.mark.filterwarnings("ignore:The run goes on")
def test_a_resumed_fit_names_what_it_came_from_before_it_has_saved(monkeypatch, tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": "2 steps"}
    make().fit(ramp(6), verbose=0, **options)
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "step-00000006"
    older = sorted(tmp_path.iterdir())[0]
    options["checkpoint_every"] = "100 steps"
    with pytest.warns(UserWarning, match="newer than"):  # those are of a run that is given up
        text = fault(make(), ramp(6), monkeypatch, 2, resume=older, **options)
    assert f"go on from {older}." in text


def test_damaged_checkpoints_are_not_named(monkeypatch, tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": "2 steps"}
    make().fit(ramp(2), verbose=0, **options)
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    options["checkpoint_every"] = "100 steps"
    with pytest.warns(UserWarning, match="not whole"):
        text = fault(make(), ramp(6), monkeypatch, 2, resume="auto", **options)
    assert "no checkpoint was written to go on from" in text


@pytest.mark.parametrize("text", [FAULTS[0], ALLOCATIONS[0]])
@pytest.mark.parametrize("what", ["evaluate", "predict"])
def test_a_fault_in_a_pass_says_that_nothing_was_updated(what, text):
    class Failing(Ones):
        def __call__(self, x):
            raise RuntimeError(text)

    trainer = Trainer(Failing(), optim.SGD(0.1), "mse")
    with pytest.raises(kind_of(text), match="Nothing was updated") as caught:
        getattr(trainer, what)(ramp(2), verbose=0)
    assert "half updated" not in str(caught.value)


def test_a_fault_in_a_validation_leaves_the_weights_of_its_step(tmp_path, monkeypatch):
    class Failing(Ones):
        def __call__(self, x):
            if not self.training:
                raise RuntimeError(FAULTS[0])
            return super().__call__(x)

    trainer = Trainer(Failing(), optim.SGD(0.1), "mse")
    with pytest.raises(DeviceError, match="are those of step 3") as caught:
        trainer.fit(
            ramp(3), ramp(1), verbose=0, checkpoint_dir=tmp_path, checkpoint_every="2 steps"
        )
    assert f"the newest checkpoint is {tmp_path / 'step-00000002'}" in str(caught.value)
