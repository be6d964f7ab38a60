"""Batches that will not fit are refused before anything is computed, and others cost nothing."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import ramp, trainer_of

import mlx_fit.foresight
from mlx_fit import DeviceConfig, OutOfMemoryError, Trainer


def data(rows, width=256):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, width)).astype(np.float32), rng.integers(0, 10, rows)


def make(limit=None, **options):
    """A model of 2.2 MB with its optimizer; 1,024 rows take some 12 MB."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    mx.eval(model.parameters())
    config = None if limit is None else DeviceConfig(memory_limit=limit)
    options = {"batch_size": 1024, "device_config": config, "seed": 0} | options
    return Trainer(model, optim.AdamW(0.01), "cross_entropy", **options)


def weights(trainer):
    return {k: np.array(v) for k, v in tree_flatten(trainer.model.parameters())}


def held():
    """What this process holds anyway: limits count all of it."""
    gc.collect()
    return mx.get_active_memory()


def refused(trainer, *args, **options):
    """The error of a fit, without its traceback, whose frames hold the batch."""
    try:
        trainer.fit(*args, verbose=0, **options)
    except OutOfMemoryError as error:
        return error.with_traceback(None)
    return pytest.fail("it was not refused")


def test_a_batch_that_will_not_fit_is_refused_with_the_numbers():
    trainer = make()
    before, key = weights(trainer), mx.random.state[0].tolist()
    trainer = make(held() + 5_000_000, seed=None)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit(data(2048), verbose=0)
    error = caught.value
    assert error.limit_bytes < error.needed_bytes
    assert (error.batch_size, error.kind) == (1024, "foreseen")
    assert "memory_limit" in str(error)
    assert "gradient_accumulation" in error.suggestion
    assert trainer.step == 0
    for name, value in weights(trainer).items():
        np.testing.assert_array_equal(value, before[name])
    assert mx.random.state[0].tolist() == key


def test_the_batch_size_that_is_suggested_fits():
    limit = held() + 6_000_000
    error = refused(make(limit), data(1024))
    size = int(error.suggestion.split("batch_size=")[1].split()[0])
    accumulation = int(error.suggestion.split("gradient_accumulation=")[1].split()[0])
    assert size * accumulation >= 1024
    mx.reset_peak_memory()
    history = make(limit, batch_size=size, gradient_accumulation=accumulation).fit(
        data(1024), verbose=0
    )
    assert len(history.epoch) == 1
    assert mx.get_peak_memory() < 1.15 * limit


def test_a_model_that_refuses_one_row_is_guarded_too():
    layers = nn.Linear(256, 256), nn.BatchNorm(256), nn.Linear(256, 10)
    mx.random.seed(0)
    model = nn.Sequential(*layers)
    mx.eval(model.state)
    limit = DeviceConfig(memory_limit=held() + 5_000_000)
    trainer = Trainer(
        model, optim.AdamW(0.01), "cross_entropy", batch_size=2048, device_config=limit
    )
    assert refused(trainer, data(2048)).kind == "foreseen"


def test_where_there_is_room_the_same_run_trains_to_the_same_bits():
    guarded, free = make(held() + 500_000_000), make()
    for trainer in (guarded, free):
        trainer.fit(data(2048), epochs=2, verbose=0)
    for name, value in weights(guarded).items():
        np.testing.assert_array_equal(value, weights(free)[name])


def test_a_much_larger_batch_later_is_refused_and_what_was_trained_is_saved(tmp_path):
    x, y = data(4096)
    small = [(x[:64], y[:64])] * 3
    trainer = make(held() + 8_000_000)
    error = refused(trainer, [*small, (x, y)], checkpoint_dir=tmp_path)
    assert error.batch_size == 4096
    assert trainer.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    trainer.fit(small, verbose=0)  # it goes on
    assert trainer.step == 6


def test_a_batch_on_its_own_is_guarded_too():
    trainer = make(held() + 5_000_000)
    with pytest.raises(OutOfMemoryError):
        trainer.train_on_batch(*data(2048))
    assert np.isfinite(trainer.train_on_batch(*data(16))["loss"])


def test_what_was_foreseen_is_split_without_a_crash():
    trainer = make(held() + 6_000_000, on_oom="split")
    with pytest.warns(UserWarning, match="micro-batches of"):
        trainer.fit(data(2048), verbose=0)
    size = trainer.micro_batch_size
    assert 1 < size < 1024
    small = make(batch_size=size, gradient_accumulation=1024 // size)
    small.fit(data(2048), verbose=0)
    for name, value in weights(small).items():
        np.testing.assert_array_equal(weights(trainer)[name], value)


class Counted:
    def __init__(self, monkeypatch):
        self.sizes = []
        original = mlx_fit.foresight.measure

        def measure(probe, batch, *rest):
            self.sizes.append(len(batch[0]))
            return original(probe, batch, *rest)

        monkeypatch.setattr(mlx_fit.foresight, "measure", measure)


def test_without_a_limit_a_small_model_is_not_measured(monkeypatch):
    counted = Counted(monkeypatch)
    make().fit(data(2048), verbose=0)
    assert counted.sizes == []


def test_without_a_limit_a_model_that_may_not_fit_is_measured(monkeypatch):
    counted = Counted(monkeypatch)
    monkeypatch.setattr(mlx_fit.guard, "limits", lambda: {"what is left": 4_000_000 + held()})
    with pytest.raises(OutOfMemoryError, match="what is left"):
        make().fit(data(2048), verbose=0)
    assert counted.sizes == [1024]


def test_only_batches_that_are_much_larger_than_before_are_measured(monkeypatch):
    counted = Counted(monkeypatch)
    x, y = data(1000)
    sizes = [100, 100, 120, 50, 200, 240, 1000, 900]
    make(held() + 500_000_000).fit([(x[:n], y[:n]) for n in sizes], epochs=2, verbose=0)
    assert counted.sizes == [100, 200, 1000]


def test_a_model_that_takes_whole_batches_only_is_trained_unguarded():
    def loss(outputs, targets):
        return (outputs.reshape(4, -1) - targets.reshape(4, -1)).square().mean(-1).reshape(4)

    x, y = np.ones((4, 4), np.float32), np.zeros((4, 3), np.float32)
    trainer = trainer_of(loss=loss, metrics=(), device_config=DeviceConfig(memory_limit="1GB"))
    history = trainer.fit([(x, y)], verbose=0)
    assert history.history["loss"] == [16.0]


def test_an_objective_with_batches_of_its_own_kind_is_trained_unguarded():
    def objective(model, batch):
        return model.weight.square().sum() * batch["scale"]

    trainer = trainer_of(
        loss=None, metrics=(), objective=lambda model, batch: mlx_sums(model, batch)
    )

    def mlx_sums(model, batch):
        return mlx_fit.Sums(objective(model, batch), 1.0)

    trainer = trainer_of(
        loss=None,
        metrics=(),
        objective=mlx_sums,
        device_config=DeviceConfig(memory_limit="1GB"),
    )
    assert trainer.fit([{"scale": np.float32(1.0)}], verbose=0).history["loss"] == [12.0]


def test_a_guarded_run_traces_the_step_itself_once():
    trainer = make(held() + 500_000_000)
    trainer.fit(data(4096), verbose=0)
    assert trainer._train_step.num_traces == 1


def test_toys_are_trained_as_ever_under_a_limit():
    plain, limited = trainer_of(), trainer_of(device_config=DeviceConfig(memory_limit="1GB"))
    assert plain.fit(ramp(), verbose=0).history == limited.fit(ramp(), verbose=0).history
