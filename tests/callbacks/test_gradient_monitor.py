"""GradientMonitor, against gradients taken by hand."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import Do, batch_of, ramp, rows_of_ones, trainer_of

from mlx_fit import (
    Callback,
    ConfigurationError,
    CSVLogger,
    FreezeUntil,
    GradientMonitor,
    Trainer,
)


def net():
    mx.random.seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def by_hand(model, x, y):
    """The norms of one batch by layer, and the whole."""

    def loss(model):
        return mx.square(model(mx.array(x)) - mx.array(y)).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    squares = {}
    for name, gradient in tree_flatten(gradients):
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + float(np.square(np.array(gradient)).sum())
    return {k: v**0.5 for k, v in squares.items()}, sum(squares.values()) ** 0.5


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_norms_are_those_of_the_gradient_before_clipping(clip):
    model = net()
    norms, whole = by_hand(model, *batch_of(1, 4))
    trainer = Trainer(model, optim.SGD(0.1), "mse", clip_norm=clip)
    history = trainer.fit([batch_of(1, 4)], callbacks=GradientMonitor(), verbose=0).history
    assert history["layer_grad_norms"][0] == pytest.approx(norms, rel=1e-5)
    assert history["grad_norm"][0] == pytest.approx(whole, rel=1e-5)


def test_an_epoch_holds_the_mean_over_updates_and_a_batch_its_own():
    batches, seen = ramp(4), []
    look = Do("on_train_batch_begin", lambda run: seen.append(None))

    class Look(GradientMonitor):
        def on_train_batch_end(self, batch, logs):
            seen.append(dict(logs.batch["layer_grad_norms"]))

    trainer = trainer_of(net(), learning_rate=0.1)
    history = trainer.fit(batches, callbacks=[look, Look()], verbose=0)
    own = [norms for norms in seen if norms]
    assert len(own) == 4
    mean = {k: np.mean([norms[k] for norms in own]) for k in own[0]}
    assert history.history["layer_grad_norms"][0] == pytest.approx(mean, rel=1e-5)


def test_a_window_has_the_norm_of_the_big_batch():
    x, y = rows_of_ones(8)
    x = x * np.arange(8, dtype=np.float32)[:, None]
    norms, _ = by_hand(net(), x, y)
    trainer = trainer_of(net(), gradient_accumulation=2)
    history = trainer.fit((x, y), shuffle=False, callbacks=GradientMonitor(), verbose=0)
    assert history.history["layer_grad_norms"] == [pytest.approx(norms, rel=1e-5)]


def test_frozen_layers_are_left_out_until_they_are_thawed():
    monitor, trainer = GradientMonitor(), trainer_of(net())
    callbacks = [FreezeUntil(1, "layers.0"), monitor]
    history = trainer.fit(ramp(2), epochs=2, callbacks=callbacks, verbose=0).history
    assert [set(norms) for norms in history["layer_grad_norms"]] == [
        {"layers.2"},
        {"layers.0", "layers.2"},
    ]
    assert monitor.layer_norms == history["layer_grad_norms"][1]


def test_a_parameter_of_the_model_itself_has_its_own_name():
    history = trainer_of().fit(ramp(2), callbacks=GradientMonitor(), verbose=0).history
    assert set(history["layer_grad_norms"][0]) == {"weight"}


def test_a_skipped_update_does_not_count():
    data = [batch_of(1), batch_of(float("nan"))]
    trainer = trainer_of(net(), nonfinite="skip", learning_rate=0.0)
    history = trainer.fit(data, callbacks=GradientMonitor(), verbose=0).history
    expected, _ = by_hand(net(), *batch_of(1))
    assert history["layer_grad_norms"][0] == pytest.approx(expected, rel=1e-5)


def test_many_layers_find_room():
    layers = [nn.Linear(4, 4) for _ in range(60)]
    trainer = trainer_of(nn.Sequential(*layers, nn.Linear(4, 3)))
    history = trainer.fit(ramp(2), callbacks=GradientMonitor(), verbose=0).history
    assert len(history["layer_grad_norms"][0]) == 61


def test_watching_changes_no_bit_and_without_it_nothing_is_logged():
    watched, plain = trainer_of(net()), trainer_of(net())
    watched.fit(ramp(4), epochs=2, callbacks=GradientMonitor(), verbose=0)
    history = plain.fit(ramp(4), epochs=2, verbose=0).history
    assert "grad_norm" not in history
    assert "layer_grad_norms" not in history
    for (_, a), (_, b) in zip(
        tree_flatten(watched.model.parameters()),
        tree_flatten(plain.model.parameters()),
        strict=True,
    ):
        assert mx.array_equal(a, b)


def test_it_leaves_the_line_and_the_csv_readable(tmp_path, capsys):
    callbacks = [GradientMonitor(), CSVLogger(tmp_path / "log.csv")]
    trainer_of(net()).fit(ramp(2), ramp(1), callbacks=callbacks, verbose=2)
    line = capsys.readouterr().out
    assert "grad_norm: " in line
    assert "layers" not in line
    columns = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    expected = ["epoch", "loss", "mae", "learning_rate", "grad_norm", "val_loss", "val_mae"]
    assert sorted(columns) == sorted(expected)


def test_it_prints_a_table_when_asked(capsys):
    callback = GradientMonitor(print_every=2)
    trainer_of(net()).fit(ramp(2), epochs=3, callbacks=callback, verbose=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Epoch 2: gradient norms"
    assert len(lines) == 3
    norms = [float(line.split()[0]) for line in lines[1:]]
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 2}], ids=str)
def test_every_few_updates_gives_the_mean_over_those_and_changes_no_bit(options):
    rows, weights = {}, []
    for every in (1, 2):
        trainer = trainer_of(net(), learning_rate=0.1, **options)
        monitor = GradientMonitor(every=every)
        history = trainer.fit(ramp(10), callbacks=monitor, log_every=1, verbose=0)
        rows[every] = {row["step"]: row.get("grad_norm") for row in history.steps}
        weights.append(tree_flatten(trainer.model.parameters()))
    assert all(rows[1].values())
    assert rows[2] == {n: norm if n % 2 == 0 else None for n, norm in rows[1].items()}
    norms = [norm for norm in rows[2].values() if norm]
    assert history.history["grad_norm"] == [pytest.approx(np.mean(norms), rel=1e-6)]
    assert set(monitor.layer_norms) == {"layers.0", "layers.2"}
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(*weights, strict=True))


def test_two_monitors_have_the_updates_that_both_need():
    callbacks = [GradientMonitor(every=4), GradientMonitor(every=6)]
    updates = []

    class Look(Callback):
        def on_train_batch_end(self, batch, logs):
            updates.extend([self.trainer.step] if "grad_norm" in logs.batch else [])

    trainer_of(net()).fit(ramp(8), callbacks=[*callbacks, Look()], verbose=0)
    assert updates == [2, 4, 6, 8]


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True])
def test_a_wrong_distance_is_named(every):
    with pytest.raises(ConfigurationError, match="every="):
        GradientMonitor(every=every)


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True])
def test_a_wrong_argument_is_named(every):
    with pytest.raises(ConfigurationError, match="print_every="):
        GradientMonitor(print_every=every)
