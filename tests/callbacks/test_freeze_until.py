"""FreezeUntil."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import Do, raising, trainer_of

from mlx_fit import ConfigurationError, FreezeUntil, Trainer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = [nn.Linear(4, 4), nn.BatchNorm(4), nn.Linear(4, 4)]
        self.head = nn.Linear(4, 3)
        self.gains = [mx.ones(3), mx.ones(3)]

    def __call__(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x) * self.gains[0] * self.gains[1]


def batches():
    rng = np.random.default_rng(0)
    shapes = [(8, 4), (8, 3)]
    return [tuple(rng.normal(size=s).astype(np.float32) for s in shapes) for _ in range(3)]


def trainable(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def changes(callback, epochs=4, model=None, optimizer=None, **options):
    """For each epoch the names of parameters that it changed."""
    model = model or Net()
    copies, found = {}, []

    def look(_):
        now = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
        if copies:
            found.append({k for k in now if not np.array_equal(now[k], copies[k])})
        copies.update(now)

    trainer = Trainer(model, optimizer or optim.SGD(0.01, momentum=0.9), "mse")
    callbacks = [Do("on_train_begin", look), Do("on_epoch_end", look), callback]
    options = {"epochs": epochs, "callbacks": callbacks, "verbose": 0} | options
    trainer.fit(batches(), **options)
    return found


STATISTICS = {"body.1.running_mean", "body.1.running_var"}


def test_the_parts_stand_still_until_their_epoch():
    found = changes(FreezeUntil(2, "body"))
    body = {n for n in trainable(Net()) if n.startswith("body")}
    assert [bool(names & body) for names in found] == [False, False, True, True]
    assert all("head.weight" in names for names in found)
    assert found[3] >= body - {"body.0.bias"}  # whose gradient batch normalisation takes away


def test_statistics_are_not_trained_when_the_layer_is_thawed():
    model = Net()
    before = trainable(model)
    during = []
    look = Do("on_train_batch_end", lambda _: during.append(trainable(model)))
    trainer = Trainer(model, optim.Adam(0.01), "mse")
    trainer.fit(batches(), epochs=3, callbacks=[FreezeUntil(1, ["body"]), look], verbose=0)
    assert not before & STATISTICS
    assert during[-1] == before
    assert during[0] == {n for n in before if not n.startswith("body")}


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        ("head", {"head.weight", "head.bias"}),
        ("head.weight", {"head.weight"}),
        ("body.[02]", {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"}),
        (["head", "body.2"], {"head.weight", "head.bias", "body.2.weight", "body.2.bias"}),
        ("*.bias", {"head.bias", "body.0.bias", "body.1.bias", "body.2.bias"}),
        ("gains", {"gains.0", "gains.1"}),
    ],
)
def test_parts_are_names_or_patterns(parts, frozen):
    model, seen = Net(), []
    everything = trainable(model)
    look = Do("on_train_batch_end", lambda _: seen.append(trainable(model)), 0)
    options = {"callbacks": [FreezeUntil(1, parts), look], "verbose": 0}
    Trainer(model, optim.SGD(0.01), "mse").fit(batches(), **options)
    assert everything - seen[0] == frozen
    assert trainable(model) == everything


def test_parts_may_be_the_modules_themselves():
    model = Net()
    found = changes(FreezeUntil(1, model.head), 2, model)
    assert not {"head.weight", "head.bias"} & found[0]
    assert {"head.weight", "head.bias"} <= found[1]
    found = changes(FreezeUntil(1, [model.head, model.body[0]]), 2, model)
    assert "body.2.weight" in found[0]


def test_what_the_user_froze_stays_frozen():
    model = Net()
    model.body[0].freeze()
    before = trainable(model)
    found = changes(FreezeUntil(1, "body"), 3, model)
    assert all("body.0.weight" not in names for names in found)
    assert "body.2.weight" in found[2]
    assert trainable(model) == before


def test_epoch_zero_freezes_nothing_and_a_late_one_everything_until_the_end():
    assert "head.weight" in changes(FreezeUntil(0, "head"), 1)[0]
    model = Net()
    before = trainable(model)
    assert "head.weight" not in changes(FreezeUntil(9, "head"), 2, model)[1]
    assert trainable(model) == before


def test_the_epoch_is_absolute():
    assert "head.weight" in changes(FreezeUntil(2, "head"), 3, initial_epoch=2)[0]
    assert "head.weight" not in changes(FreezeUntil(3, "head"), 3, initial_epoch=2)[0]


def test_after_an_error_the_model_is_as_it_was():
    model = Net()
    before = trainable(model)
    with pytest.raises(OSError, match="x"):
        changes([FreezeUntil(9, "body"), Do("on_epoch_end", raising(OSError("x")))], 2, model)
    assert trainable(model) == before


def test_two_of_them_thaw_one_after_the_other():
    found = changes([FreezeUntil(1, "body.2"), FreezeUntil(2, "body.0")], 3)
    assert ["body.2.weight" in names for names in found] == [False, True, True]
    assert ["body.0.weight" in names for names in found] == [False, False, True]


def test_thawed_weights_train_as_with_a_hand_written_loop():
    mx.random.seed(0)
    model, twin = Net(), Net()
    twin.update(model.parameters())
    mx.eval(model.parameters(), twin.parameters())
    changes(FreezeUntil(1, "body"), 2, model, optim.AdamW(0.01))
    optimizer = optim.AdamW(0.01)
    twin.train()
    for epoch in range(2):
        for name in ("body", "head"):
            for layer in [twin.head] if name == "head" else twin.body:
                keys = [k for k in layer if not k.startswith("running")]
                if name == "body" and epoch == 0:
                    layer.freeze(keys=keys)
                else:
                    layer.unfreeze(keys=keys)
        for x, y in batches():

            def loss(model, x=x, y=y):
                return nn.losses.mse_loss(model(mx.array(x)), mx.array(y))

            _, gradients = nn.value_and_grad(twin, loss)(twin)
            optimizer.init(twin.trainable_parameters())
            optimizer.update(twin, gradients)
            mx.eval(twin.parameters(), optimizer.state)
    mine, theirs = (dict(tree_flatten(m.parameters())) for m in (model, twin))
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], rtol=2e-5, atol=1e-6)


def test_its_state_says_whether_the_parts_are_frozen():
    callback, states = FreezeUntil(1, "head"), []
    look = Do("on_epoch_end", lambda _: states.append(callback.state_dict()))
    changes([callback, look], 2)
    assert json.loads(json.dumps(states)) == [{"is_frozen": True}, {"is_frozen": False}]
    model = Net()
    load = Do("on_train_begin", lambda _: callback.load_state_dict(states[0]))
    look = Do("on_train_begin", lambda _: states.append("head.weight" in trainable(model)))
    changes([callback, load, look], 2, model, initial_epoch=1)
    assert states[2] is False


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(ConfigurationError, match=r"'tail' names nothing that is trained.*head"):
        changes(FreezeUntil(1, "tail"))
    with pytest.raises(ConfigurationError, match="a Linear that is not in the model"):
        changes(FreezeUntil(1, nn.Linear(2, 2)))


def test_freezing_everything_is_refused_by_the_step():
    with pytest.raises(ConfigurationError, match="no trainable parameters"):
        trainer_of().fit(batches(), callbacks=FreezeUntil(1, "*"), verbose=0)


@pytest.mark.parametrize(
    ("epoch", "parts"), [(-1, "a"), (1.5, "a"), (1, []), (1, [3]), (1, 3), (1, None), ("1", "a")]
)
def test_wrong_arguments_are_named(epoch, parts):
    with pytest.raises(ConfigurationError, match=r"FreezeUntil: (epoch|parts)="):
        FreezeUntil(epoch, parts)
