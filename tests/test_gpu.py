"""What needs a GPU of MLX's: Metal or CUDA. Skipped where there is none."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import DeviceConfig, LambdaCallback, OutOfMemoryError, Trainer

pytestmark = pytest.mark.gpu


def data(rows, width=512):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, width)).astype(np.float32), rng.integers(0, 10, rows)


def make(**options):
    gc.collect()
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10))
    mx.eval(model.parameters())
    config = DeviceConfig(device="gpu", **options.pop("limits", {}))
    return Trainer(model, optim.AdamW(1e-3), "cross_entropy", device_config=config, **options)


def test_training_on_the_gpu_is_that_of_the_cpu():
    losses = []
    for device in ("gpu", "cpu"):
        trainer = make(seed=0)
        trainer.device_config = DeviceConfig(device=device)
        losses.append(trainer.fit(data(512), epochs=2, verbose=0).history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_predicted_peak_is_the_measured_one_within_15_percent(accumulation):
    trainer, batch, peaks = make(gradient_accumulation=accumulation), data(4096), []
    plan = trainer.plan(batch)

    def begin(*_):
        mx.reset_peak_memory()

    watch = LambdaCallback(
        on_train_batch_begin=begin, on_train_batch_end=lambda *_: peaks.append(mx.get_peak_memory())
    )
    trainer.fit([batch] * 12, callbacks=watch, verbose=0)
    assert plan.peak_bytes == pytest.approx(max(peaks), rel=0.15)


def test_a_batch_that_will_not_fit_is_refused():
    trainer = make(batch_size=8192, limits={"memory_limit": "64MB"})
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit(data(8192), verbose=0)
    assert caught.value.kind == "foreseen"


def test_a_real_out_of_memory_is_survived():
    """A model whose activations alone exceed any card: rows are halved until one fits."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(512, 8)

        def __call__(self, x):
            if x.shape[0] > 4:
                x = x + mx.zeros((x.shape[0], 1 << 40, 1)).sum(1)
            return self.layer(x)

    trainer = Trainer(
        Wide(),
        optim.SGD(0.1),
        "cross_entropy",
        batch_size=16,
        on_oom="split",
        device_config=DeviceConfig(device="gpu"),
    )
    x, y = data(16)
    with pytest.warns(UserWarning, match="micro-batches of 4 rows"):
        trainer.fit((x, y % 8), verbose=0)
