"""Mixed precision: what is cast, what is not, and the dynamic loss scale."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fit import ConfigurationError, NonFiniteLossError, Trainer, precision
from mlx_fit.precision import Precision, initial_scale, next_scale, weights_of

MIXED = ["mixed_bfloat16", "mixed_float16"]


class Spy(nn.Module):
    """A network that notes the dtypes it computes in."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm(16), nn.Linear(16, 3)
        self._seen = {}

    def __call__(self, x):
        hidden = self.first(x)
        self._seen["hidden"] = hidden.dtype
        self._seen["running"] = self.norm.running_mean.dtype
        self._seen["frozen"] = self.last.weight.dtype
        return self.last(nn.relu(self.norm(hidden)))


def make(cls=Spy, name="mixed_bfloat16", optimizer=None, **options):
    mx.random.seed(1)
    model = cls()
    mx.eval(model.parameters())
    optimizer = optimizer or optim.AdamW(0.01)
    return Trainer(model, optimizer, "cross_entropy", precision=name, **options)


def batches(n, rng, size=16):
    for _ in range(n):
        x = rng.normal(size=(size, 4)).astype(np.float32)
        yield x, (x[:, :3].argmax(-1)).astype(np.int32)


def overflowing(rng):
    """Inputs near float16's largest number, 65504: the forward pass gives infinities."""
    x, y = next(batches(1, rng))
    return np.full_like(x, 6e4), y


def weights(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


# --- what is cast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXED)
def test_forward_is_in_half_precision_and_everything_kept_is_float32(name, rng):
    trainer = make(name=name)
    trainer.fit(list(batches(5, rng)), list(batches(2, rng)), verbose=0)
    half = mx.bfloat16 if name == "mixed_bfloat16" else mx.float16
    assert trainer.model._seen == {"hidden": half, "running": mx.float32, "frozen": half}
    kept = tree_flatten(trainer.model.parameters()) + tree_flatten(trainer.optimizer.state)
    assert {v.dtype for _, v in kept if mx.issubdtype(v.dtype, mx.floating)} == {mx.float32}
    assert trainer.predict(next(batches(1, rng))[0], verbose=0).dtype == np.float32


@pytest.mark.parametrize("name", MIXED)
def test_frozen_weights_are_cast_too_and_stay_as_they_are(name, rng):
    trainer = make(name=name)
    trainer.model.last.freeze()
    before = np.array(trainer.model.last.weight)
    trainer.fit(list(batches(5, rng)), verbose=0)
    assert trainer.model._seen["frozen"] == trainer.model._seen["hidden"] != mx.float32
    np.testing.assert_array_equal(np.array(trainer.model.last.weight), before)
    assert trainer.model.last.weight.dtype == mx.float32


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", MIXED)
def test_training_comes_near_float32(name, accumulation, rng):
    data, losses = list(batches(20, rng)), []
    for policy in ("float32", name):
        trainer = make(name=policy, gradient_accumulation=accumulation)
        losses.append(trainer.fit(data, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    assert losses[1] != losses[0]
    assert losses[1][-1] < 0.7 * losses[1][0]


def test_small_updates_are_not_lost_in_mixed_precision(rng):
    """A bfloat16 weight of 1 does not feel 1e-4; its float32 master does."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.ones((4, 3))

        def __call__(self, x):
            return x @ self.weight

    trainer = make(One, optimizer=optim.SGD(1e-3))
    trainer.fit(list(batches(3, rng)), verbose=0)
    assert not np.array_equal(np.array(trainer.model.weight), np.ones((4, 3)))


def test_half_precision_weights_are_kept_in_float32_once_training_is_mixed(rng):
    model = Spy()
    model.set_dtype(mx.bfloat16)
    Trainer(model, optim.SGD(0.1), "cross_entropy", precision="mixed_bfloat16")
    assert model.first.weight.dtype == mx.float32


@pytest.mark.parametrize("name", ["float32", *MIXED])
def test_buffers_keep_what_the_forward_pass_wrote(name, rng):
    """A frozen array of any name that the model itself updates."""

    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.mean = nn.Linear(4, 3), mx.zeros((4,))
            self.freeze(recurse=False, keys=["mean"])

        def __call__(self, x):
            self.mean = 0.5 * self.mean + 0.5 * mx.stop_gradient(x.astype(mx.float32)).mean(0)
            return self.last(x)

    trainer = make(Average, name)
    (x, y) = next(batches(1, rng))
    trainer.fit([(x, y)], verbose=0)
    np.testing.assert_allclose(np.array(trainer.model.mean), 0.5 * x.mean(0), atol=2e-3)


@pytest.mark.parametrize("name", MIXED)
def test_modules_kept_in_a_dict_with_numbers_for_keys_train(name, rng):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = {"0": nn.Linear(4, 8), "1": nn.Linear(8, 3)}

        def __call__(self, x):
            return self.experts["1"](self.experts["0"](x))

    trainer = make(Experts, name)
    history = trainer.fit(list(batches(3, rng)), verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_targets_and_weights_are_never_cast(rng):
    seen = {}

    def loss(outputs, targets):
        seen.update(outputs=outputs.dtype, targets=targets.dtype)
        return (outputs - targets).square().mean(-1)

    x = rng.normal(size=(8, 4)).astype(np.float32)
    trainer = Trainer(nn.Linear(4, 2), optim.SGD(0.1), loss, precision="mixed_float16")
    trainer.fit([(x, x[:, :2], np.full(8, 1e6, np.float32))], verbose=0)
    assert seen == {"outputs": mx.float32, "targets": mx.float32}
    assert np.isfinite(np.array(trainer.model.weight)).all()


def test_integer_inputs_are_not_cast(rng):
    trainer = Trainer(
        nn.Sequential(nn.Embedding(300, 3)),
        optim.SGD(0.1),
        "cross_entropy",
        precision="mixed_bfloat16",
    )
    x = np.array([255, 257, 299])  # bfloat16 would round 257
    expected = np.array(trainer.model.layers[0].weight)[x]
    np.testing.assert_allclose(trainer.predict(x, verbose=0), expected, rtol=1e-2)


def test_bfloat16_converts_everything_but_statistics_and_warns(rng):
    with pytest.warns(UserWarning, match="mixed_bfloat16"):
        trainer = make(name="bfloat16")
    trainer.fit(list(batches(2, rng)), verbose=0)
    dtypes = {name: value.dtype for name, value in tree_flatten(trainer.model.parameters())}
    assert dtypes.pop("norm.running_mean") == dtypes.pop("norm.running_var") == mx.float32
    assert set(dtypes.values()) == {mx.bfloat16}


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="'mixed_bfloat16'"):
        Precision.get("fp16")


def test_weights_are_all_floats_but_running_statistics():
    model = Spy()
    model.table = mx.array([1, 2])
    names = {name for name, _ in weights_of(model)}
    assert names == {f"{m}.{p}" for m in ("first", "norm", "last") for p in ("weight", "bias")}


# --- layers that promote --------------------------------------------------------------------------


class Promoting(nn.Module):
    """Multiplies by a float32 constant."""

    def __call__(self, x):
        return x * mx.array(2.0)


def test_a_layer_that_promotes_is_named_once(rng):
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Promoting(), nn.ReLU()), nn.Linear(8, 3))
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy", precision="mixed_bfloat16")
    data = list(batches(2, rng)) + list(batches(1, rng, size=5))
    with pytest.warns(UserWarning, match=r"layers\.1\.layers\.0") as caught:
        trainer.fit(data, epochs=2, verbose=0)
    assert len(caught) == 1
    assert "layers.2" not in str(caught[0].message)
    assert type(model.layers[0]) is nn.Linear
    trainer.fit(data, verbose=0)  # warnings are errors here: it is not named again


@pytest.mark.parametrize("name", ["float32", *MIXED])
def test_layers_that_do_not_promote_are_not_named(name, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = make(name=name).fit(list(batches(1, rng)), verbose=0)
    assert history.epoch == [0]


def test_looking_for_promotion_changes_no_bit(rng):
    """BatchNorm and dropout ran once more for it: neither statistics nor the key may show."""
    data, runs = list(batches(3, rng)), []
    for watched in (True, False):
        trainer = make(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8), nn.Dropout(0.5)))
        mx.random.seed(3)
        with pytest.MonkeyPatch.context() as patch:
            if not watched:
                patch.setattr("mlx_fit.precision.warn_of_promotion", lambda *_: None)
            trainer.fit(data, verbose=0)
        runs.append(weights(trainer.model))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][name], err_msg=name)


# --- the loss scale -------------------------------------------------------------------------------


def scale_of(trainer):
    return trainer.state_dict()["loss_scale"]["scale"].item()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("at", [0, 4])
def test_an_overflow_skips_the_update_and_halves_the_scale(at, accumulation, rng):
    """With accumulation the whole window is skipped, as PyTorch's GradScaler does."""
    data = list(batches(6, rng))
    data[at] = overflowing(rng)
    window = at // accumulation
    rest = data[: window * accumulation] + data[(window + 1) * accumulation :]
    trainer = make(name="mixed_float16", gradient_accumulation=accumulation)
    history = trainer.fit(data, verbose=0)
    assert scale_of(trainer) == 2.0**15
    assert history.history["skipped_updates"] == [1]
    assert trainer.optimizer.step.item() == 6 // accumulation - 1
    other = make(name="mixed_float16", gradient_accumulation=accumulation)
    other.fit(rest, verbose=0)
    for name, value in weights(trainer.model).items():
        if "running" not in name or accumulation == 1:
            np.testing.assert_allclose(
                value, weights(other.model)[name], rtol=2e-2, atol=1e-3, err_msg=name
            )


def test_an_overflow_leaves_running_statistics_as_they_were(rng):
    trainer = make(name="mixed_float16")
    before = weights(trainer.model)
    trainer.fit([overflowing(rng)], verbose=0)
    for name, value in weights(trainer.model).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_overflows_are_no_error_until_the_scale_falls_below_one(policy, rng):
    trainer = make(name="mixed_float16", nonfinite=policy)
    trainer.fit([overflowing(rng)] * 16, verbose=0)
    assert scale_of(trainer) == 1.0
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit([overflowing(rng)] * 100, verbose=0)
    assert caught.value.step == 17


def test_training_goes_on_after_the_scale_fell_below_one(rng):
    trainer = make(name="mixed_float16")
    with pytest.raises(NonFiniteLossError):
        trainer.fit([overflowing(rng)] * 20, verbose=0)
    history = trainer.fit(list(batches(12, rng)), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert trainer.optimizer.step.item() > 0


def test_the_scale_doubles_after_enough_good_updates(rng, monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 4)
    monkeypatch.setattr(precision, "INITIAL_SCALE", 256.0)
    trainer = make(name="mixed_float16")
    trainer.fit(list(batches(3, rng)), verbose=0)
    assert scale_of(trainer) == 256
    trainer.fit(list(batches(1, rng)), verbose=0)
    assert scale_of(trainer) == 512
    trainer.fit([*batches(3, rng), overflowing(rng), *batches(3, rng)], verbose=0)
    assert scale_of(trainer) == 256  # the overflow started the count again


def test_the_scale_follows_its_rule():
    assert precision.GROWTH_INTERVAL == 2000
    state = initial_scale()
    assert state["scale"].item() == 65536
    for _ in range(1999):
        state = next_scale(state, mx.array(False))
    assert state["scale"].item() == 65536
    state = next_scale(state, mx.array(False))
    assert (state["scale"].item(), state["good_updates"].item()) == (131072, 0)
    state = next_scale(state, mx.array(True))
    assert (state["scale"].item(), state["good_updates"].item()) == (65536, 0)


def test_small_gradients_survive_float16_by_the_scale(rng):
    """A gradient of 1e-8 is 0 in float16; times the scale it is not."""
    x = np.full((4, 4), 1e-4, np.float32)
    model = nn.Linear(4, 1, bias=False)
    before = np.array(model.weight)
    trainer = Trainer(
        model,
        optim.SGD(1e4),
        lambda outputs, _: outputs.square().mean(-1) * 0.01,
        precision="mixed_float16",
    )
    trainer.fit([(x, x)], verbose=0)
    expected = before - 1e4 * 0.01 * 2 * (x[0] @ before.T) * x[0]
    moved = np.abs(np.array(model.weight) - before).max()
    assert moved > 0
    np.testing.assert_allclose(np.array(model.weight) - before, expected - before, rtol=0.05)


def test_the_scale_goes_on_in_the_next_fit_and_travels_in_the_state(rng):
    trainer = make(name="mixed_float16")
    trainer.fit([overflowing(rng)] * 2, verbose=0)
    other = make(name="mixed_float16")
    other.load_state_dict(trainer.state_dict())
    other.fit([overflowing(rng)], verbose=0)
    assert (scale_of(trainer), scale_of(other)) == (2.0**14, 2.0**13)


def test_an_objective_gets_its_batch_untouched_and_only_the_models_inputs_are_cast(rng):
    x, y = rng.normal(size=(8, 4)).astype(np.float32), np.full(8, 1234.5, np.float32)
    seen = {}

    class Watched(nn.Linear):
        def __call__(self, x):
            seen["input"] = x.dtype
            return super().__call__(x)

    def objective(model, batch):
        seen["targets"] = batch["y"].dtype
        return (model(batch["x"])[:, 0] - batch["y"]).square().mean()

    trainer = Trainer(
        Watched(4, 1), optim.SGD(1e-9), objective=objective, precision="mixed_bfloat16"
    )
    trainer.fit([{"x": x, "y": y}], verbose=0)
    assert seen == {"input": mx.bfloat16, "targets": mx.float32}
    assert type(trainer.model) is Watched
