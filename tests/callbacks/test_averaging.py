"""EMA and SWA, against averages made by hand and by PyTorch."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from toys import Do, Ones, Recorder, batch_of, raising, ramp, rows_of_ones, trainer_of, weight_of

from mlx_fit import (
    EMA,
    SWA,
    ConfigurationError,
    EarlyStopping,
    FreezeUntil,
    ModelCheckpoint,
    Trainer,
)

RAW = [0.973333, 0.947378, 0.922114]  # the toy's weight after 1, 2 and 3 updates
AVERAGED = 0.9658755  # Keras's number for decay 0.9


def ones(count=12):
    return {"train": rows_of_ones(count), "verbose": 0}


def weight_in(path):
    return mx.load(str(path))["weight"][0, 0].item()


def averaged(callback):
    return callback.averages()["weight"][0, 0].item()


def weights_after_each_update(trainer, data, **options):
    seen = []
    look = Do("on_train_batch_end", lambda run: seen.append(np.array(run.model.weight)))
    callbacks = [look, *options.pop("callbacks", [])]
    trainer.fit(data, verbose=0, callbacks=callbacks, **options)
    return seen


# --- EMA ------------------------------------------------------------------------------------------


def test_the_average_is_kerass_and_the_raw_weights_are_back():
    trainer, ema = trainer_of(), EMA(0.9)
    trainer.fit(**ones(), callbacks=ema)
    assert averaged(ema) == pytest.approx(AVERAGED, abs=1e-6)
    assert weight_of(trainer) == pytest.approx(RAW[2], abs=1e-6)
    assert ema.num_averaged == 3


def test_the_first_update_copies_the_weights():
    trainer, ema = trainer_of(), EMA(0.9)
    trainer.fit(**ones(4), callbacks=ema)
    assert averaged(ema) == weight_of(trainer)


def test_a_decay_that_a_hook_changes_reaches_the_next_update():
    trainer, ema = trainer_of(), EMA(0.9)
    change = Do("on_train_batch_begin", lambda _: setattr(ema, "decay", 0.0), 2)
    trainer.fit(**ones(), callbacks=[change, ema])
    assert averaged(ema) == weight_of(trainer)


def test_it_agrees_with_torchs_averaged_model(rng):
    trainer, ema = trainer_of(nn.Linear(4, 3)), EMA(0.8)
    seen = weights_after_each_update(trainer, ramp(7), callbacks=[ema])
    model = torch.nn.Linear(4, 3, bias=False)
    reference = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    for weight in seen:
        model.weight.data = torch.tensor(weight)
        reference.update_parameters(model)
    expected = reference.module.weight.detach().numpy()
    np.testing.assert_allclose(ema.averages()["weight"], expected, rtol=1e-5)


def test_validation_judges_the_averages_and_training_does_not_notice():
    plain, trainer, ema = trainer_of(), trainer_of(), EMA(0.9)
    alone = plain.fit(**ones(), epochs=3)
    seen = Do("on_test_batch_end", lambda run: inside.append(weight_of(run)))
    inside = []
    history = trainer.fit(**ones(), val=rows_of_ones(4), epochs=3, callbacks=[ema, seen])
    assert history.history["loss"] == alone.history["loss"]
    assert mx.array_equal(trainer.model.weight, plain.model.weight)
    assert inside[0] == pytest.approx(AVERAGED, abs=1e-6)
    assert history.history["val_loss"][0] == pytest.approx((4 * AVERAGED) ** 2, rel=1e-5)


def test_evaluate_and_predict_use_the_averages_where_it_is_given_and_put_back():
    trainer, ema = trainer_of(), EMA(0.9)
    trainer.fit(**ones(), callbacks=ema)
    x = np.ones((2, 4), np.float32)
    options = {"callbacks": ema, "verbose": 0}
    assert trainer.predict(x, **options)[0, 0] == pytest.approx(4 * AVERAGED, rel=1e-5)
    loss = trainer.evaluate(rows_of_ones(2), **options)["loss"]
    assert loss == pytest.approx((4 * AVERAGED) ** 2, rel=1e-5)
    assert weight_of(trainer) == pytest.approx(RAW[2], abs=1e-6)
    assert trainer.predict(x, verbose=0)[0, 0] == pytest.approx(4 * RAW[2], rel=1e-5)
    assert trainer.averages is None


def test_between_batches_of_a_prediction_the_raw_weights_are_there():
    trainer, ema = trainer_of(), EMA(0.9)
    trainer.fit(**ones(), callbacks=ema)
    x = np.ones((8, 4), np.float32)
    for outputs in trainer.predict_batches(x, callbacks=ema, verbose=0):
        assert outputs[0, 0] == pytest.approx(4 * AVERAGED, rel=1e-5)
        assert weight_of(trainer) == pytest.approx(RAW[2], abs=1e-6)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("options", [{}, {"save_freq": 3}], ids=["epoch", "steps"])
def test_weight_files_hold_the_averages_in_any_order_of_callbacks(tmp_path, order, options):
    trainer = trainer_of()
    checkpoint = ModelCheckpoint(tmp_path / "w.safetensors", **options)
    trainer.fit(**ones(), callbacks=[EMA(0.9), checkpoint][::order])
    assert weight_in(tmp_path / "w.safetensors") == pytest.approx(AVERAGED, abs=1e-6)
    assert weight_of(trainer) == pytest.approx(RAW[2], abs=1e-6)
    trainer.save_weights(tmp_path / "raw.safetensors")
    assert weight_in(tmp_path / "raw.safetensors") == weight_of(trainer)


@pytest.mark.parametrize("order", [1, -1])
def test_early_stopping_restores_the_averages_that_were_judged(tmp_path, order):
    trainer, judged = trainer_of(learning_rate=0.3), []
    best = ModelCheckpoint(tmp_path / "w.safetensors", save_best_only=True)
    stopping = EarlyStopping(patience=9, restore_best_weights=True)
    look = Do("on_test_batch_end", lambda run: judged.append(weight_of(run)))
    callbacks = [EMA(0.5), stopping, best][::order]
    history = trainer.fit(
        ramp(3), ramp(3), epochs=4, callbacks=[*callbacks, look], validation_freq=1, verbose=0
    )
    epoch, value = history.best("val_loss")
    assert weight_of(trainer) == judged[3 * epoch] == weight_in(tmp_path / "w.safetensors")
    assert trainer.evaluate(ramp(3), verbose=0)["loss"] == pytest.approx(value, rel=1e-6)


def test_windows_count_and_micro_batches_do_not(rng):
    data, (big, small) = ramp(5), (EMA(0.5), EMA(0.5))
    trainer = trainer_of(gradient_accumulation=2)
    ema_raw = weights_after_each_update(trainer, data, callbacks=[big])
    assert big.num_averaged == 3
    expected = 0.5 * (0.5 * ema_raw[1] + 0.5 * ema_raw[3]) + 0.5 * ema_raw[4]
    np.testing.assert_allclose(big.averages()["weight"], expected, rtol=1e-6)
    trainer = trainer_of(gradient_accumulation=2)
    trainer.fit(iter(data), callbacks=small, verbose=0)  # the short window ends after the hooks
    assert mx.array_equal(small.averages()["weight"], big.averages()["weight"])


def test_a_skipped_update_is_not_averaged():
    data = [batch_of(1), batch_of(float("nan")), batch_of(1)]
    trainer, ema = trainer_of(nonfinite="skip"), EMA(0.9)
    trainer.fit(data, callbacks=ema, verbose=0)
    other, reference = trainer_of(), EMA(0.9)
    other.fit(data[::2], callbacks=reference, verbose=0)
    assert ema.num_averaged == 2
    assert averaged(ema) == pytest.approx(averaged(reference), rel=1e-6)


def test_the_first_update_that_is_applied_is_copied():
    trainer, ema = trainer_of(nonfinite="skip"), EMA(0.9)
    trainer.fit([batch_of(float("nan")), batch_of(1)], callbacks=ema, verbose=0)
    assert averaged(ema) == weight_of(trainer)


def test_start_step_waits():
    trainer, ema = trainer_of(), EMA(0.9, start_step=2)
    val_loss = trainer.fit(**ones(8), val=rows_of_ones(4), callbacks=ema).history["val_loss"]
    assert ema.averages() == {}
    assert val_loss[0] == pytest.approx((4 * RAW[1]) ** 2, rel=1e-5)
    trainer.fit(**ones(4), callbacks=ema)
    assert averaged(ema) == weight_of(trainer)


def test_warmup_forgets_early_weights_sooner():
    trainer, ema = trainer_of(), EMA(0.999, warmup=True)
    raw = weights_after_each_update(trainer, ramp(4), callbacks=[ema])
    expected = raw[0]
    for n, weight in enumerate(raw[1:], 1):
        share = min(0.999, (1 + n) / (10 + n))
        expected = share * expected + (1 - share) * weight
    np.testing.assert_allclose(ema.averages()["weight"], expected, rtol=1e-6)


def test_apply_puts_the_averages_into_the_model():
    trainer, ema = trainer_of(), EMA(0.9)
    with pytest.raises(ConfigurationError, match="nothing has been averaged yet"):
        ema.apply()
    trainer.fit(**ones(), callbacks=ema)
    ema.apply()
    assert weight_of(trainer) == pytest.approx(AVERAGED, abs=1e-6)


def test_another_fit_goes_on_and_another_model_starts_over():
    whole, parts, trainer = EMA(0.9), EMA(0.9), trainer_of()
    trainer_of().fit(**ones(), callbacks=whole)
    for _ in range(3):
        trainer.fit(**ones(4), callbacks=parts)
    assert averaged(parts) == averaged(whole)
    other = trainer_of()
    other.fit(**ones(4), callbacks=parts)
    assert averaged(parts) == weight_of(other)


def test_its_state_goes_on_in_another_run_as_if_unbroken():
    whole, first, second = EMA(0.9), EMA(0.9), EMA(0.9)
    trainer_of().fit(**ones(), callbacks=whole)
    trainer = trainer_of()
    trainer.fit(**ones(8), callbacks=first)
    state = first.state_dict()
    arrays = state.pop("averages")
    assert json.loads(json.dumps(state)) == {"num_averaged": 2}
    resumed = trainer_of()
    resumed.load_state_dict(trainer.state_dict())
    load = Do("on_train_begin", lambda _: second.load_state_dict(state | {"averages": arrays}))
    resumed.fit(**ones(4), callbacks=[second, load])
    assert averaged(second) == averaged(whole)
    assert mx.array_equal(resumed.model.weight, trainer_after(12).model.weight)


def trainer_after(count):
    trainer = trainer_of()
    trainer.fit(**ones(count))
    return trainer


def test_a_loaded_state_serves_without_a_fit():
    trainer, first, second = trainer_of(), EMA(0.9), EMA(0.9)
    trainer.fit(**ones(), callbacks=first)
    second.load_state_dict(first.state_dict())
    loss = trainer.evaluate(rows_of_ones(2), callbacks=second, verbose=0)["loss"]
    assert loss == pytest.approx((4 * AVERAGED) ** 2, rel=1e-5)


def test_after_an_error_the_raw_weights_are_back():
    for hook in ("on_test_batch_end", "on_test_begin", "on_epoch_end", "on_train_batch_end"):
        trainer, breaks = trainer_of(), Do(hook, raising(OSError("x")))
        with pytest.raises(OSError, match="x"):
            trainer.fit(**ones(4), val=rows_of_ones(4), callbacks=[EMA(0.9), breaks])
        assert weight_of(trainer) == pytest.approx(RAW[0], abs=1e-6)
        assert trainer.averages is None


def test_an_evaluation_inside_an_evaluation_puts_back_once():
    trainer, ema = trainer_of(), EMA(0.9)

    def evaluate(run):
        run.evaluate(rows_of_ones(2), callbacks=ema, verbose=0)

    inside = Do("on_test_batch_end", evaluate)
    history = trainer.fit(**ones(), val=rows_of_ones(8), callbacks=[ema, inside])
    assert history.history["val_loss"][0] == pytest.approx((4 * AVERAGED) ** 2, rel=1e-5)
    assert weight_of(trainer) == pytest.approx(RAW[2], abs=1e-6)


def test_two_that_average_are_refused():
    with pytest.raises(ConfigurationError, match="EMA and SWA both average"):
        trainer_of().fit(**ones(), callbacks=[EMA(), SWA(0)])
    trainer, (one, two) = trainer_of(), (EMA(), EMA())
    for ema in (one, two):
        trainer.fit(**ones(4), callbacks=ema)
    with pytest.raises(ConfigurationError, match="EMA and EMA both average"):
        trainer.evaluate(rows_of_ones(2), callbacks=[one, two], verbose=0)
    assert weight_of(trainer) == pytest.approx(RAW[1], abs=1e-6)


def test_running_statistics_are_averaged_with_the_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4), nn.Linear(4, 3))
    ema, seen = EMA(0.5), []
    look = Do("on_train_batch_end", lambda _: seen.append(np.array(model.layers[1].running_mean)))
    trainer = trainer_of(model)
    trainer.fit(ramp(2), callbacks=[ema, look], verbose=0)
    assert np.any(seen[0] != seen[1])
    average = ema.averages()["layers.1.running_mean"]
    np.testing.assert_allclose(average, (seen[0] + seen[1]) / 2, rtol=1e-6)


def test_frozen_weights_are_left_alone_until_they_are_thawed():
    model, names = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), []
    ema = EMA(0.5)
    look = Do("on_epoch_end", lambda _: names.append({*ema.averages()}))
    trainer = trainer_of(model)
    trainer.fit(ramp(2), epochs=2, callbacks=[ema, FreezeUntil(1, "layers.0"), look], verbose=0)
    assert names[0] == {"layers.1.weight", "layers.1.bias"}
    assert names[1] == {name for name, _ in tree_flatten(model.parameters())}


def test_half_precision_is_averaged_in_float32():
    model = Ones()
    model.weight = model.weight.astype(mx.bfloat16)
    ema = EMA(0.999)
    trainer = Trainer(model, optim.SGD(0.01), "mse")
    trainer.fit(ramp(2) * 40, callbacks=ema, verbose=0)
    assert ema.averages()["weight"].dtype == mx.bfloat16
    assert ema.state_dict()["averages"]["weight"].dtype == mx.float32


@pytest.mark.parametrize("average", [lambda: EMA(0.9), lambda: EMA(0.9, warmup=True), SWA])
def test_the_averages_of_an_eager_run_are_the_same_and_compile_nothing(average, monkeypatch):
    found = []
    for compiles in (True, False):
        callback = average()
        with monkeypatch.context() as patch:
            if not compiles:
                patch.setattr(mx, "compile", raising(AssertionError))
            trainer_of(compile=compiles).fit(**ones(), epochs=3, callbacks=callback)
        found.append(np.array(callback.averages()["weight"]))
    np.testing.assert_array_equal(*found)


def test_averaging_traces_nothing_anew():
    shapes = []

    def loss(outputs, targets):
        shapes.append(outputs.shape)
        return mx.square(outputs - targets)

    trainer = trainer_of(loss=loss, metrics=[])
    trainer.fit(**ones(16), val=rows_of_ones(4), epochs=3, callbacks=EMA(0.9))
    assert shapes == [(4, 3), (4, 3)]  # once for training, once for validation


def test_the_hooks_of_other_callbacks_are_as_without_it():
    with_ema, without = Recorder(), Recorder()
    trainer_of().fit(**ones(8), val=rows_of_ones(4), callbacks=[EMA(), with_ema])
    trainer_of().fit(**ones(8), val=rows_of_ones(4), callbacks=[without])
    assert with_ema.events == without.events


@pytest.mark.parametrize(
    "options",
    [{"decay": 1.0}, {"decay": -0.1}, {"decay": "0.9"}, {"start_step": -1}, {"warmup": 1}],
)
def test_wrong_arguments_of_ema_are_named(options):
    with pytest.raises(ConfigurationError, match=f"EMA: {next(iter(options))}="):
        EMA(**options)


# --- SWA ------------------------------------------------------------------------------------------


def weights_at_epoch_ends(callbacks, epochs=4, **options):
    seen, trainer = [], trainer_of()
    look = Do("on_epoch_end", lambda run: seen.append(np.array(run.model.weight)))
    options = {"epochs": epochs, "callbacks": [*callbacks, look], "verbose": 0} | options
    history = trainer.fit(ramp(3), **options)
    return trainer, seen, history


@pytest.mark.parametrize(("start", "first"), [(0, 0), (2, 2), (0.5, 2), (0.75, 3), (0.0, 0)])
def test_swa_is_the_mean_of_the_epochs_from_start_on(start, first):
    swa = SWA(start)
    _, seen, _ = weights_at_epoch_ends([swa])
    assert swa.num_averaged == 4 - first
    expected = np.mean(seen[first:], axis=0)
    np.testing.assert_allclose(swa.averages()["weight"], expected, rtol=1e-6)


def test_swa_every_so_many_steps():
    swa, trainer = SWA(1, every=2), trainer_of()
    raw = weights_after_each_update(trainer, ramp(3), callbacks=[swa], epochs=3)
    expected = np.mean([raw[n - 1] for n in (4, 6, 8)], axis=0)
    np.testing.assert_allclose(swa.averages()["weight"], expected, rtol=1e-6)


def test_swa_is_validated_with_the_epoch_that_just_ended():
    swa, inside = SWA(1), []
    look = Do("on_test_batch_end", lambda run: inside.append(np.array(run.model.weight)))
    _, seen, _ = weights_at_epoch_ends([swa, look], 3, val=ramp(1))
    np.testing.assert_allclose(inside[0], seen[0])
    np.testing.assert_allclose(inside[2], (seen[1] + seen[2]) / 2, rtol=1e-6)
    assert swa.num_averaged == 2


def test_evaluations_inside_an_epoch_add_nothing():
    swa = SWA(0)
    weights_at_epoch_ends([swa], 2, val=ramp(1), validation_freq="1 steps")
    assert swa.num_averaged == 2


def test_swa_sets_its_learning_rate_from_its_first_epoch_on():
    _, _, history = weights_at_epoch_ends([SWA(2, learning_rate=0.5)])
    assert history.history["learning_rate"] == pytest.approx([0.01, 0.01, 0.5, 0.5])
    _, _, history = weights_at_epoch_ends([SWA(2)])
    assert history.history["learning_rate"] == pytest.approx([0.01] * 4)


def test_swa_with_a_rate_refuses_a_schedule():
    trainer = trainer_of(learning_rate=lambda step: mx.array(0.1))
    with pytest.raises(ConfigurationError, match="SWA sets the learning rate"):
        trainer.fit(ramp(1), callbacks=SWA(0, learning_rate=0.1), verbose=0)
    trainer_of(learning_rate=lambda step: mx.array(0.1)).fit(ramp(1), callbacks=SWA(0), verbose=0)


def test_swa_in_weight_files(tmp_path):
    swa = SWA(0)
    weights_at_epoch_ends([swa, ModelCheckpoint(tmp_path / "w.safetensors")])
    assert weight_in(tmp_path / "w.safetensors") == averaged(swa)


@pytest.mark.parametrize(
    "options",
    [
        {"start": -1},
        {"start": 1.0},
        {"start": "2"},
        {"every": 0},
        {"every": "step"},
        {"learning_rate": -1},
    ],
)
def test_wrong_arguments_of_swa_are_named(options):
    with pytest.raises(ConfigurationError, match=f"SWA: {next(iter(options))}="):
        SWA(**options)
