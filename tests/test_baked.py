"""Settings that hooks change between batches: the compiled step follows, as an eager one would."""

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import Do

from mlx_fit import EarlyStopping, LambdaCallback, TerminateOnNaN, Timer, Trainer, baked
from mlx_fit.baked import MANY, BakedIn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [
            nn.Linear(4, 8),
            nn.BatchNorm(8),
            nn.Dropout(0.5),
            nn.Tanh(),
            nn.Linear(8, 1),
        ]
        self.scales = [1.0, 1.0]
        self.offset = {"by": (0.0, 0.0)}
        self.activation = nn.relu

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.activation(x * self.scales[0]) + x + self.offset["by"][1]


def set_rate(trainer):
    trainer.model.layers[2]._p_1 = 0.9


def set_evaluation(trainer):
    trainer.model.layers[1].eval()


def set_scales(trainer):
    trainer.model.scales[0] = 2.0


def set_offset(trainer):
    trainer.model.offset["by"] = (0.0, 3.0)


def set_function(trainer):
    trainer.model.activation = nn.silu


def set_layer(trainer):
    trainer.model.layers[3] = nn.GELU()


def set_decay(trainer):
    trainer.optimizer.weight_decay = 0.5


def set_betas(trainer):
    trainer.optimizer.betas[0] = 0.1


def freeze(trainer):
    trainer.model.layers[0].freeze()


CHANGES = [
    *(set_rate, set_evaluation, set_scales, set_offset, set_function),
    *(set_layer, set_decay, set_betas, freeze),
]
X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
DATA = X, X[:, :1] ** 2


def trained(callbacks, model=None, epochs=1, **options):
    mx.random.seed(0)
    model = model or Net()
    fit = {name: options.pop(name) for name in ("validation_freq",) if name in options}
    trainer = Trainer(model, optim.AdamW(0.05, [0.9, 0.99]), "mse", batch_size=4, seed=1, **options)
    val = DATA if fit else None
    history = trainer.fit(DATA, val, epochs=epochs, callbacks=callbacks, verbose=0, **fit)
    return np.concatenate([np.array(p).ravel() for _, p in leaves(model)]), history, trainer


def leaves(model):
    return nn.utils.tree_flatten(model.parameters())


@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_batch_hook_changes_counts_from_the_next_batch_on(change, hook):
    weights, history, _ = trained(Do(hook, change, 2))
    eager, expected, _ = trained(Do(hook, change, 2), compile=False)
    np.testing.assert_allclose(weights, eager, rtol=1e-5, atol=1e-6)
    assert history.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    unchanged, *_ = trained(None)
    assert unchanged.shape != weights.shape or np.abs(unchanged - weights).max() > 1e-4


@pytest.mark.parametrize("change", [set_rate, set_decay])
def test_in_the_first_batch_in_windows_and_when_batches_may_be_split(change):
    callbacks = [Do("on_train_batch_end", change, 0), Do("on_train_batch_begin", set_scales, 3)]
    for options in ({"gradient_accumulation": 4}, {"on_oom": "split"}, {"nonfinite": "skip"}):
        weights, *_ = trained(callbacks, **options)
        eager, *_ = trained(callbacks, compile=False, **options)
        np.testing.assert_allclose(weights, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_test_end"])
def test_what_a_hook_of_a_validation_inside_of_an_epoch_changes_counts_too(hook):
    weights, *_ = trained(Do(hook, set_decay), validation_freq="2 steps")
    eager, *_ = trained(Do(hook, set_decay), validation_freq="2 steps", compile=False)
    np.testing.assert_allclose(weights, eager, rtol=1e-5, atol=1e-6)


def test_a_function_in_a_lambda_callback_is_user_code():
    def change(batch, logs):
        set_decay(trainer)

    mx.random.seed(0)
    trainer = Trainer(Net(), optim.AdamW(0.05, [0.9, 0.99]), "mse", batch_size=4, seed=1)
    trainer.fit(DATA, callbacks=LambdaCallback(on_train_batch_end=change), verbose=0)
    eager, *_ = trained(Do("on_train_batch_end", set_decay), compile=False)
    weights = np.concatenate([np.array(p).ravel() for _, p in leaves(trainer.model)])
    np.testing.assert_allclose(weights, eager, rtol=1e-5, atol=1e-6)


class Counting(Net):
    """A model whose forward pass, which runs when MLX traces it, changes its own settings."""

    num_calls = 0

    def __call__(self, x):
        self.num_calls = self.num_calls + 1
        self._last = x
        return super().__call__(x)


@pytest.mark.parametrize("kind", [Net, Counting])
def test_hooks_that_change_nothing_cost_no_trace(kind):
    """Setting what is there already, and what a forward pass itself sets, is no change."""

    def same(trainer):
        trainer.model.layers[2]._p_1 = float("0.5")
        trainer.model.scales[:] = [float("1.0"), float("1.0")]
        trainer.model.offset = {"by": (float("0.0"), float("0.0"))}

    num_traces = []
    for hooks in ([], [Do("on_train_batch_end", same)]):
        *_, trainer = trained(hooks, kind())
        num_traces.append(trainer._train_step.num_traces)
    assert num_traces[0] == num_traces[1]


def test_without_hooks_of_the_user_nobody_looks(monkeypatch):
    looks = []
    monkeypatch.setattr(BakedIn, "look", lambda *_: looks.append(1))
    own = [EarlyStopping("loss"), TerminateOnNaN(), Timer(99), Do("on_epoch_end", lambda _: None)]
    trained(own, epochs=2)
    assert not looks
    trained([*own, Do("on_train_batch_end", lambda _: None)], epochs=2)
    assert len(looks) == 12


class Followed:
    """What of a model is baked in, and how often it looked changed, and was."""

    def __init__(self, model):
        self.num_doubts, self.num_changes = 0, 0
        self.baked = BakedIn(model, optim.AdamW(0.1), self.follow)

    def follow(self):
        self.num_doubts += 1
        self.num_changes += self.baked.has_changed()


def test_a_run_that_changes_nothing_is_looked_at_no_closer(monkeypatch):
    closer = []
    monkeypatch.setattr(BakedIn, "has_changed", lambda self: closer.append(1))
    trained(Do("on_train_batch_end", lambda _: None), epochs=2)
    assert not closer


def test_a_change_with_every_batch_is_warned_of():
    model = nn.Dropout(0.1)
    followed = Followed(model)
    for number in range(MANY):
        model._p_1 = number
        followed.baked.look()
    assert followed.num_changes == MANY
    model._p_1 = 0.5
    with pytest.warns(UserWarning, match="33 times"):
        followed.baked.look()
    followed.baked.look()
    assert followed.num_doubts == MANY + 1


def test_settings_that_cannot_be_compared_are_told_apart_by_identity():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = np.ones(3)

    model = Masked()
    followed = Followed(model)
    for mask in (model.mask, np.zeros(3)):
        model.mask = mask
        followed.baked.look()
        followed.baked.look()
    assert followed.num_doubts == followed.num_changes == 1


def test_a_list_that_changes_counts_for_the_next_evaluation_as_well():
    model = Net()
    trainer = Trainer(model, None, "mse")
    before = trainer.evaluate(DATA, verbose=0)["loss"]
    set_scales(trainer)
    after = trainer.evaluate(DATA, verbose=0)["loss"]
    assert after == pytest.approx(Trainer(model, None, "mse").evaluate(DATA, verbose=0)["loss"])
    assert after != before


class Noting(Net):
    """A model that notes at each pass what it has seen, in fields of every kind."""

    num_passes = 0

    def __init__(self):
        super().__init__()
        self.counts, self.seen, self._last = 0, [0, 0], {}

    def __call__(self, x):
        self.counts, self.num_passes = self.counts + 1, self.num_passes + 1
        self.seen = [len(x), self.counts]
        self._last["mean"] = x.mean()
        self.__dict__.setdefault("logged", {})["rows"] = len(x)
        return super().__call__(x)


def num_traces(callbacks, model=None, **options):
    *_, trainer = trained(callbacks, model, epochs=3, **options)
    return trainer._train_step.num_traces


def test_what_a_forward_pass_notes_with_each_call_costs_no_traces():
    assert num_traces(None, Noting()) <= 2  # the second because it keeps an array
    watching = Do("on_train_batch_end", lambda trainer: trainer.model(mx.array(X[:3])))
    assert num_traces(watching, Noting()) <= 4
    assert num_traces(watching, Noting(), validation_freq="2 steps") <= 4


def test_what_hooks_note_on_the_model_and_the_optimizer_costs_no_traces():
    def note(trainer):
        trainer.model.loss = trainer.step / 7
        trainer.model.losses = [trainer.step / 7]
        trainer.model.layers[0].table = np.ones(trainer.step)
        trainer.optimizer.num_calls = trainer.step

    assert num_traces(Do("on_train_batch_end", note)) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_noted_beside_a_setting_does_not_hide_that_it_changes(change):
    def note(trainer):
        trainer.model.loss = trainer.model.layers[0].loss = trainer.step / 7
        trainer.model.layers[2].loss = trainer.optimizer.num_calls = trainer.step

    callbacks = [Do("on_train_batch_end", note), Do("on_train_batch_begin", change, 3)]
    weights, *_ = trained(callbacks)
    eager, *_ = trained(callbacks, compile=False)
    np.testing.assert_allclose(weights, eager, rtol=1e-5, atol=1e-6)


def test_a_setting_that_hides_one_of_its_class_and_one_made_in_time_count():
    class Scaled(Net):
        scale = 1.0

        def __call__(self, x):
            return super().__call__(x) * self.scale * self.gain

    def begin(trainer):
        trainer.model.gain = 1.0

    def change(trainer):
        trainer.model.loss = trainer.step / 7
        if trainer.step >= 2:
            trainer.model.scale, trainer.model.gain = 2.0, 3.0

    callbacks = [Do("on_train_begin", begin), Do("on_train_batch_end", change)]
    weights, *_ = trained(callbacks, Scaled())
    eager, *_ = trained(callbacks, Scaled(), compile=False)
    np.testing.assert_allclose(weights, eager, rtol=1e-5, atol=1e-6)
    assert num_traces(callbacks, Scaled()) == 2


def test_an_optimizer_may_keep_what_it_computes():
    class Keeping(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            self.norm, self.norms = gradient.square().sum(), [gradient.sum()]
            return super().apply_single(gradient, parameter, state)

    trainer = Trainer(Net(), Keeping(0.1), "mse", batch_size=4)
    trainer.fit(DATA, epochs=2, callbacks=Do("on_train_batch_end", lambda _: None), verbose=0)
    assert trainer._train_step.num_traces == 1


def test_what_a_forward_pass_notes_compiles_no_evaluation_and_no_prediction_anew():
    trainer = Trainer(Noting(), optim.SGD(0.1), "mse", batch_size=8)
    trainer.fit(DATA, DATA, epochs=4, verbose=0)
    assert trainer.model.counts <= 5  # traces: each runs the forward pass once
    before = trainer.model.counts
    for _ in range(4):
        trainer.predict(X)
    assert trainer.model.counts <= before + 2


def test_notes_of_one_fit_are_no_settings_of_the_next_nor_of_another_trainer():
    def note(trainer):
        trainer.model.loss = trainer.optimizer.loss = trainer.step / 7

    model, optimizer = Net(), optim.AdamW(0.05, [0.9, 0.99])
    for trainer in [Trainer(model, optimizer, "mse", batch_size=4)] * 2 + [
        Trainer(model, optimizer, "mse", batch_size=4)
    ]:
        trainer.fit(DATA, epochs=2, callbacks=Do("on_train_batch_end", note), verbose=0)
        assert trainer._train_step.num_traces == 1


def test_nothing_is_remembered_of_models_that_are_gone():
    trained(None)
    num_objects = len(baked._FIRST)
    for _ in range(5):
        gc.collect()
        trained(Do("on_train_batch_end", set_layer, 2))
    assert len(baked._FIRST) <= num_objects + 1  # the layer that came late
