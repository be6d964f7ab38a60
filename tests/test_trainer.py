"""``Trainer``: construction, single batches, state, summary."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import Ones, batch_of, ramp, still_trainer, trainer_of, weight_of

from mlx_fit import CheckpointMismatchError, ConfigurationError, NonFiniteLossError, Trainer


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": Ones}, "model is the class .*; make an object"),
        ({"model": object()}, "expected an mlx.nn.Module"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; expected an MLX optimizer"),
        ({"optimizer": optim.SGD}, "is the class SGD; make an object"),
        ({"loss": "mes"}, "Did you mean 'mse'"),
        ({"metrics": ["acuracy"]}, "Did you mean 'accuracy'"),
        ({"objective": lambda model, batch: 0}, "either loss= or objective="),
        ({"batch_size": 0}, "batch_size=0; expected"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation=0"),
        ({"clip_norm": -1}, "clip_norm=-1"),
        ({"clip_norm": "1"}, "clip_norm='1'"),
        ({"clip_value": 0}, "clip_value=0"),
        ({"clip_norm": 1, "clip_value": 1}, "not both"),
        ({"precision": "fp16"}, "expected one of 'float32', 'mixed_bfloat16'"),
        ({"nonfinite": "stop"}, "expected 'raise', 'skip' or 'ignore'"),
        ({"device_config": "gpu"}, "DeviceConfig"),
        ({"compile": "no"}, "compile='no'"),
        ({"seed": "a"}, "seed='a'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(options, says):
    good = {"model": Ones(), "optimizer": optim.SGD(0.1), "loss": "mse"}
    with pytest.raises(ConfigurationError, match=says):
        Trainer(**(good | options))


def test_training_needs_a_loss_and_an_optimizer():
    with pytest.raises(ConfigurationError, match="has no loss"):
        Trainer(Ones(), optim.SGD(0.1)).fit(ramp(), verbose=0)
    with pytest.raises(ConfigurationError, match="has no optimizer"):
        Trainer(Ones(), loss="mse").fit(ramp(), verbose=0)
    with pytest.raises(ConfigurationError, match="has no optimizer"):
        Trainer(Ones(), loss="mse").train_on_batch(batch_of(1))


# --- single batches ------------------------------------------------------------------------------


def test_train_on_batch_counts_each_batch_alone():
    trainer = still_trainer()
    assert [trainer.train_on_batch(batch_of(i))["loss"] for i in (0, 1, 3)] == [0.0, 16.0, 144.0]


def test_train_on_batch_makes_one_update():
    trainer = trainer_of()
    trainer.train_on_batch(*batch_of(1))
    assert weight_of(trainer) == pytest.approx(0.973333, rel=1e-6)
    trainer.train_on_batch(batch_of(1))
    assert weight_of(trainer) == pytest.approx(0.947378, rel=1e-6)
    assert trainer.step == 2


def test_train_on_batch_updates_under_accumulation_too():
    trainer = trainer_of(gradient_accumulation=4)
    trainer.train_on_batch(batch_of(1))
    assert weight_of(trainer) == pytest.approx(0.973333, rel=1e-6)


def test_train_on_batch_takes_weights():
    x = np.concatenate([batch_of(1, 1)[0], batch_of(2, 1)[0]])
    found = still_trainer().train_on_batch(x, np.zeros((2, 3)), np.array([3, 1]))
    assert found["loss"] == (3 * 16 + 64) / 4


def test_train_on_batch_names_a_loss_that_is_no_number_and_goes_on():
    trainer = still_trainer()
    trainer.train_on_batch(batch_of(1))
    with pytest.raises(NonFiniteLossError):
        trainer.train_on_batch(batch_of(np.inf))
    assert trainer.step == 2
    trainer.model.weight = mx.ones((4, 3))
    assert trainer.train_on_batch(batch_of(1))["loss"] == 16.0


def test_batches_and_fits_share_one_count():
    trainer = trainer_of()
    trainer.train_on_batch(batch_of(1))
    trainer.fit(ramp(3), verbose=0)
    trainer.train_on_batch(batch_of(1))
    trainer.fit(ramp(2), verbose=0)
    assert trainer.step == trainer.optimizer.step.item() == 7


def test_train_on_batch_restores_the_mode():
    trainer = trainer_of()
    trainer.model.eval()
    trainer.train_on_batch(batch_of(1))
    assert not trainer.model.training


# --- state ---------------------------------------------------------------------------------------


def stochastic(seed=0):
    mx.random.seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8), nn.Dropout(0.5), nn.Linear(8, 3))
    return Trainer(model, optim.AdamW(0.01), "mse", batch_size=4, seed=seed)


def rows(rng):
    x = rng.normal(size=(12, 4)).astype(np.float32)
    return x, x[:, :3]


def test_a_loaded_state_goes_on_bit_for_bit(rng):
    data, whole, other = rows(rng), stochastic(), stochastic(seed=9)
    whole.fit(data, epochs=2, verbose=0)
    state = whole.state_dict()
    expected = whole.fit(data, initial_epoch=2, epochs=4, verbose=0).history["loss"]
    other.fit(data, verbose=0)  # something to be overwritten
    other.load_state_dict(state)
    assert other.step == 6
    found = other.fit(data, initial_epoch=2, epochs=4, verbose=0).history["loss"]
    assert found == expected
    assert mx.array_equal(other.model.layers[0].weight, whole.model.layers[0].weight)
    assert mx.array_equal(other.model.layers[1].running_mean, whole.model.layers[1].running_mean)


def test_without_the_state_the_run_differs(rng):
    data, whole, other = rows(rng), stochastic(), stochastic(seed=9)
    for trainer in (whole, other):
        trainer.fit(data, epochs=2, verbose=0)
    assert not mx.array_equal(other.model.layers[0].weight, whole.model.layers[0].weight)


def test_a_state_does_not_follow_later_training(rng):
    trainer = stochastic()
    trainer.fit(rows(rng), verbose=0)
    state = trainer.state_dict()
    before = np.array(state["model"]["layers.0.weight"])
    trainer.fit(rows(rng), verbose=0)
    assert np.array_equal(np.array(state["model"]["layers.0.weight"]), before)


def test_a_state_of_another_model_changes_nothing(rng):
    trainer, other = stochastic(), trainer_of()
    trainer.fit(rows(rng), verbose=0)
    with pytest.raises(CheckpointMismatchError, match="missing weight"):
        other.load_state_dict(trainer.state_dict())
    assert weight_of(other) == 1.0
    assert other.step == 0


@pytest.mark.parametrize("state", [{}, None, {"model": {}}])
def test_something_that_is_no_state_is_refused(state):
    with pytest.raises(ConfigurationError, match="state_dict"):
        trainer_of().load_state_dict(state)


# --- summary -------------------------------------------------------------------------------------


def test_the_summary_counts_what_is_trained(capsys):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8), nn.Linear(8, 3))
    model.layers[0].freeze()
    Trainer(model).summary()
    out = capsys.readouterr().out
    assert "layers.0" in out
    assert "layers.2" in out
    # 4*8 + 8, frozen; 2*8 and the running statistics' 2*8, frozen; 8*3 + 3
    assert "99 parameters, 43 trained, 56 frozen" in out


def test_the_summary_counts_arrays_in_lists_and_shared_ones_once(capsys):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.tied = self.first
            self.parts = [mx.ones((2, 2)), {"deep": mx.ones((3,))}]

    Trainer(Odd()).summary()
    out = capsys.readouterr().out
    assert "23 parameters, 23 trained, 0 frozen" in out
    assert "(model)" in out


def test_the_summary_of_a_model_without_parameters(capsys):
    Trainer(nn.ReLU()).summary()
    assert "0 parameters, 0 trained" in capsys.readouterr().out


def test_the_direction_of_a_key_is_its_metrics():
    trainer = trainer_of(metrics=["mae", "accuracy"])
    trainer.fit(ramp(), {"a": ramp()}, verbose=0)
    assert [trainer.direction(k) for k in ("loss", "val_loss", "mae")] == [False] * 3
    assert trainer.direction("val_a_accuracy") is True
    assert trainer.direction("nothing") is None
