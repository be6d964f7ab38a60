"""Batches of evaluation and prediction that will not fit are refused, or computed in parts."""

from __future__ import annotations

import gc
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fit.guard
import mlx_fit.pass_guard
from mlx_fit import DeviceConfig, OutOfMemoryError, Trainer
from mlx_fit.errors import ConfigurationError

FULL = "[malloc] Unable to allocate 9000 bytes."


def data(rows, width=64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, width)).astype(np.float32), rng.integers(0, 10, rows)


def held():
    gc.collect()
    return mx.get_active_memory()


def make(room=None, **options):
    """A model of 0.4 MB; the forward pass of 4,096 rows takes some 5 MB."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10))
    mx.eval(model.parameters())
    config = None if room is None else DeviceConfig(memory_limit=held() + room)
    options = {"batch_size": 4096, "device_config": config, "seed": 0} | options
    return Trainer(model, optim.SGD(0.01), "cross_entropy", ["accuracy"], **options)


def silently(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, verbose=0, **options)


@pytest.mark.parametrize("what", ["evaluate", "predict"])
def test_a_batch_that_will_not_fit_is_refused_with_the_numbers(what):
    x, y = data(4096)
    trainer, key = make(10_000_000), mx.random.state[0].tolist()
    with pytest.raises(OutOfMemoryError) as caught:
        getattr(trainer, what)((x, y), verbose=0)
    error = caught.value
    assert str(error).startswith("An evaluation" if what == "evaluate" else "A prediction")
    assert error.kind == "foreseen"
    assert error.batch_size == 4096
    assert error.limit_bytes < error.needed_bytes
    assert mx.random.state[0].tolist() == key
    size = int(error.suggestion.split("batch_size=")[1].split()[0])
    assert 1 <= size < 4096
    assert getattr(trainer, what)((x, y), batch_size=size, verbose=0) is not None


@pytest.mark.parametrize("compile", [True, False])
def test_what_is_predicted_is_what_it_takes(compile):
    """Of an unguarded pass: within a fifth."""
    trainer, refused = make(compile=compile), make(10_000_000, compile=compile)
    x, y = data(4096)
    for what in ("evaluate", "predict"):
        with pytest.raises(OutOfMemoryError) as caught:
            getattr(refused, what)((x, y), verbose=0)
        caught.value.__traceback__ = None
        mx.reset_peak_memory()
        getattr(trainer, what)((x, y), verbose=0)
        assert caught.value.needed_bytes == pytest.approx(mx.get_peak_memory(), rel=0.2)


def test_foreseen_or_not_evaluation_has_the_same_values():
    free, guarded, split = make(), make(500_000_000), make(10_000_000, on_oom="split")
    expected = free.evaluate(data(5000), verbose=0)
    assert guarded.evaluate(data(5000), verbose=0) == expected
    with pytest.warns(UserWarning, match="evaluation goes on with micro-batches") as caught:
        assert split.evaluate(data(5000), verbose=0) == pytest.approx(expected, rel=1e-5)
    assert len(caught) == 1
    assert split.micro_batch_size == 4096


def test_foreseen_or_not_predictions_are_the_same():
    x, _ = data(5000)
    expected = make().predict(x, verbose=0)
    split = make(10_000_000, on_oom="split")
    with pytest.warns(UserWarning, match="prediction goes on with micro-batches") as caught:
        found = split.predict(x, verbose=0)
    assert len(caught) == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert [len(part) for part in split.predict_batches(x, verbose=0)] == [4096, 904]
    np.testing.assert_array_equal(found, split.predict(x, verbose=0))  # silently, from now on


def test_validation_in_a_fit_is_refused_and_the_epochs_training_is_saved(tmp_path):
    x, y = data(4096)
    trainer = make(12_000_000, batch_size=64)
    val = [(x, y)]
    with pytest.raises(OutOfMemoryError, match="An evaluation with batch_size=4096"):
        trainer.fit((x[:256], y[:256]), val, checkpoint_dir=tmp_path, verbose=0)
    assert trainer.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_validation_in_a_fit_is_split_and_training_keeps_its_bits():
    x, y = data(4096)
    split, free = make(12_000_000, batch_size=64, on_oom="split"), make(batch_size=64)
    found = silently(split.fit, (x[:256], y[:256]), [(x, y)], epochs=2)
    expected = silently(free.fit, (x[:256], y[:256]), [(x, y)], epochs=2)
    for (name, a), (_, b) in zip(
        tree_flatten(split.model.parameters()), tree_flatten(free.model.parameters()), strict=True
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=name)
    assert found.history["val_loss"] == pytest.approx(expected.history["val_loss"], rel=1e-5)


class Room(nn.Module):
    """Outputs of several kinds, and a device that has room for ``room`` rows only."""

    def __init__(self, room, scalar=False):
        super().__init__()
        self.layer, self.room, self.scalar = nn.Linear(4, 3), room, scalar

    def __call__(self, x):
        if x.shape[0] > self.room:
            raise RuntimeError(FULL)
        found = self.layer(x)
        return {"both": [found, None], "last": found.sum() if self.scalar else found[:, -1]}


def test_trees_of_predictions_are_put_together_from_parts():
    x = np.arange(44, dtype=np.float32).reshape(11, 4)
    mx.random.seed(0)
    trainer = Trainer(Room(2), batch_size=8, on_oom="split")
    found = silently(trainer.predict, x)
    trainer.model.room = 100
    expected = silently(Trainer(trainer.model, batch_size=8).predict, x)
    np.testing.assert_allclose(found["both"][0], expected["both"][0], rtol=1e-6)
    np.testing.assert_allclose(found["last"], expected["last"], rtol=1e-6)
    assert found["both"][1] is None


def test_a_scalar_output_cannot_come_in_parts():
    trainer = Trainer(Room(2, scalar=True), batch_size=8, on_oom="split")
    with pytest.raises(ConfigurationError, match="cannot be computed in parts"):
        silently(trainer.predict, np.ones((8, 4), np.float32))


def test_one_row_that_does_not_fit_raises():
    trainer = Trainer(Room(0), batch_size=8, on_oom="split")
    with pytest.raises(OutOfMemoryError) as caught:
        silently(trainer.predict, np.ones((8, 4), np.float32))
    assert caught.value.batch_size == 1


def test_only_batches_that_are_much_larger_than_before_are_measured(monkeypatch):
    sizes, original = [], mlx_fit.pass_guard.measure

    def measure(probe, batch, *rest):
        sizes.append(batch[0].shape[0])
        return original(probe, batch, *rest)

    monkeypatch.setattr(mlx_fit.pass_guard, "measure", measure)
    x, y = data(1000)
    trainer = make(500_000_000)
    batches = [(x[:n], y[:n]) for n in (100, 100, 120, 50, 200, 1000, 900)]
    trainer.evaluate(batches, verbose=0)
    trainer.evaluate(batches, verbose=0)
    assert sizes == [100, 200, 1000]
    make().evaluate(batches, verbose=0)
    make().predict(batches, verbose=0)
    assert len(sizes) == 3  # without a limit shapes alone tell that they fit
    trainer.predict(batches, verbose=0)
    assert sizes[3:] == [100, 200, 1000]


def test_guarded_passes_are_traced_once():
    trainer = make(500_000_000)
    trainer.evaluate(data(8192), verbose=0)
    trainer.predict(data(8192)[0], verbose=0)
    steps = trainer._pass_steps
    assert steps._evaluation.num_traces == 1
    assert steps._prediction._batch.num_traces == 1
