"""Weights under PyTorch's weight_norm and spectral_norm, in both of its ways; grouped layers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_fit import CheckpointMismatchError
from mlx_fit.interop.torch import load_weights

torch = pytest.importorskip("torch")
tnn = torch.nn
new, old = tnn.utils.parametrizations, tnn.utils

LAYERS = {
    "linear": (lambda: tnn.Linear(3, 4), lambda: nn.Linear(3, 4), (2, 3)),
    "one row": (lambda: tnn.Linear(3, 1), lambda: nn.Linear(3, 1), (2, 3)),
    "conv": (lambda: tnn.Conv2d(3, 4, 3), lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
    "transposed": (
        lambda: tnn.ConvTranspose2d(4, 4, 3),
        lambda: nn.ConvTranspose2d(4, 4, 3),
        (2, 4, 5, 5),
    ),
}


def outputs(model, x):
    """Outputs of an MLX model for PyTorch's layout."""
    if x.ndim == 2:
        return np.array(model(mx.array(x)))
    return np.array(model(mx.array(x.transpose(0, 2, 3, 1)))).transpose(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "norm",
    [new.weight_norm, new.spectral_norm, old.weight_norm, old.spectral_norm],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"],
)
def test_the_weight_is_that_of_evaluation(norm, layer, by_name):
    torch.manual_seed(0)
    make, counterpart, shape = LAYERS[layer]
    theirs = tnn.Sequential(norm(make()))
    x = torch.randn(shape)
    for _ in range(3):  # the vectors of spectral_norm follow
        theirs(x).square().mean().backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= 0.1 * parameter.grad
    ours = nn.Sequential(counterpart())
    load_weights(ours, theirs.eval().state_dict() if by_name else theirs.eval())
    with torch.no_grad():
        np.testing.assert_allclose(outputs(ours, x.numpy()), theirs(x).numpy(), atol=2e-6)


def test_a_norm_over_the_whole_weight_and_over_another_axis():
    for dim in (None, 1):
        theirs = tnn.Sequential(new.weight_norm(tnn.Linear(3, 4), dim=dim))
        ours = nn.Sequential(nn.Linear(3, 4))
        load_weights(ours, theirs)
        expected = theirs[0].weight.detach().numpy()
        np.testing.assert_allclose(np.array(ours.layers[0].weight), expected, rtol=1e-6)


def test_names_that_only_look_like_it_are_left_alone():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate_g, self.rate_v = mx.zeros(3), mx.zeros(5)

    model = Named()
    load_weights(model, {"rate_g": np.ones(3), "rate_v": np.ones(5)})
    assert model.rate_v.tolist() == [1.0] * 5


def test_a_model_that_has_the_parts_itself_gets_them():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_g, self.weight_v = mx.zeros((4, 1)), mx.zeros((4, 3))

    model = Own()
    load_weights(model, {"weight_g": np.ones((4, 1)), "weight_v": np.ones((4, 3))})
    assert model.weight_g.tolist() == [[1.0]] * 4


def test_other_parametrizations_are_named_with_the_way_out():
    theirs = tnn.Sequential(new.orthogonal(tnn.Linear(4, 4)))
    with pytest.raises(CheckpointMismatchError, match="remove_parametrizations"):
        load_weights(nn.Sequential(nn.Linear(4, 4)), theirs)


def test_grouped_transposed_convolutions_are_refused_with_their_groups():
    theirs = tnn.Sequential(tnn.ConvTranspose2d(4, 6, 3, groups=2))
    with pytest.raises(CheckpointMismatchError, match=r"has groups=2: .* have none"):
        load_weights(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), theirs)
    plain = tnn.Sequential(tnn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(CheckpointMismatchError, match="has groups=2: give this one as many"):
        load_weights(nn.Sequential(nn.Conv2d(4, 6, 3)), plain)
