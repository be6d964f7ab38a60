"""Groups of parameters against PyTorch's own param_groups."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_fit import Trainer
from mlx_fit.errors import ConfigurationError
from mlx_fit.interop.torch import export_weights, load_weights, optimizers, param_groups

torch = pytest.importorskip("torch")
tnn = torch.nn


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def torch_model():
    return tnn.Sequential(tnn.Linear(4, 8), tnn.LayerNorm(8), tnn.Tanh(), tnn.Linear(8, 3))


def train_torch(theirs, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        tnn.functional.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()


def test_groups_train_as_those_of_torch(rng):
    theirs, ours = torch_model(), model()
    load_weights(ours, theirs)
    batches = [(rng.normal(size=(8, 4)).astype("f"), rng.integers(0, 3, 8)) for _ in range(20)]
    no_decay = {"weight_decay": 0.0}
    groups = [
        {"params": [theirs[0].weight], "lr": 1e-3},
        {"params": [theirs[0].bias], "lr": 1e-3, **no_decay},
        {"params": [theirs[1].weight, theirs[1].bias, theirs[3].bias], **no_decay},
        {"params": [theirs[3].weight]},
    ]
    train_torch(theirs, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5), batches)
    optimizer = param_groups(
        ours,
        optimizers.AdamW,
        [{"params": "layers.0", "lr": 1e-3}],
        no_decay=True,
        lr=1e-2,
        weight_decay=0.5,
    )
    Trainer(ours, optimizer, "cross_entropy").fit(batches, verbose=0)
    for name, tensor in export_weights(ours).items():
        np.testing.assert_allclose(tensor, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "rates"),
    [
        ("*.bias", [0.5, 1, 0.5, 1, 0.5, 1]),
        ("layers.3", [1, 1, 1, 1, 0.5, 0.5]),
        (["layers.3.weight", "layers.0"], [0.5, 0.5, 1, 1, 1, 0.5]),
        (lambda name, array: array.ndim == 2, [1, 0.5, 1, 1, 1, 0.5]),
    ],
)
def test_parameters_are_chosen_by_beginning_pattern_or_function(params, rates):
    ours = model()
    optimizer = param_groups(
        ours, optim.SGD, [{"params": params, "learning_rate": 0.5}], learning_rate=1.0
    )
    before = dict(export_weights(ours))
    ones = tree_map(lambda array: array * 0 + 1, ours.trainable_parameters())
    optimizer.init(ours.trainable_parameters())
    optimizer.update(ours, ones)
    names = ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"]
    after = export_weights(ours)
    moved = [float((before[name] - after[name]).mean()) for name in names]
    np.testing.assert_allclose(moved, rates, rtol=1e-4)


def test_what_decays_not_are_biases_vectors_and_norms():
    ours = model()
    ours.scale, ours.layers[1].matrix = mx.ones(3), mx.ones((2, 2))
    optimizer = param_groups(ours, optim.AdamW, no_decay=True, learning_rate=1e-3, weight_decay=0.1)
    assert optimizer.filters[0]("scale", None)
    assert optimizer.filters[0]("layers.1.matrix", None)
    assert [part.weight_decay for part in optimizer.optimizers] == [0.0, 0.1]
    assert optimizer.filters[0]("layers.1.weight", None)
    assert not optimizer.filters[0]("layers.0.weight", None)


def test_a_single_group_is_a_plain_optimizer():
    assert isinstance(param_groups(model(), optim.SGD, learning_rate=1e-3), optim.SGD)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([{"params": "encoder"}], {}, "fits no trainable parameter.*layers.0.weight"),
        ([{"params": "*"}, {"params": "layers.0"}], {}, "only parameters of earlier groups"),
        ([{"lr": 1}], {}, "with 'params'"),
        ([{"params": [3]}], {}, "by name, not by object"),
        ([], {"no_decay": True}, "needs weight_decay"),
    ],
)
def test_groups_that_cannot_work_are_refused(groups, options, message):
    with pytest.raises(ConfigurationError, match=message):
        param_groups(model(), optim.SGD, groups, learning_rate=0.1, **options)
