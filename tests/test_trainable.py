"""What is frozen and thawed by name."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.trainable import set_trainable, trainable_names


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 2), nn.BatchNorm(2)]
        self.scales = [mx.ones((2,)), mx.zeros((2,))]
        self.heads = {"a.b": nn.Linear(2, 1)}
        self._buffer = mx.zeros((2,))


def test_exactly_the_named_parameters_are_trained():
    model = Nested()
    names = trainable_names(model)
    model.layers[0].freeze(keys=["bias"])
    model.freeze(keys=["scales"], recurse=False)
    some = trainable_names(model)
    assert {*names} - {*some} == {"layers.0.bias", "scales.0", "scales.1"}
    set_trainable(model, names)
    assert trainable_names(model) == names
    set_trainable(model, some)
    assert trainable_names(model) == some
    set_trainable(model, ["heads.a.b.weight"])
    assert trainable_names(model) == ["heads.a.b.weight"]
