"""Each pair of scripts in examples/ports: the same weights and rows give the same losses."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

from mlx_fit.interop.torch import compare, load_weights

torch = pytest.importorskip("torch")

PORTS = Path(__file__).parents[2] / "examples" / "ports"
MODELS = {"cnn": "CNN", "resnet": "ResNet", "vae": "VAE", "lstm": "CharLSTM", "gpt": "GPT"}


def script(name):
    spec = importlib.util.spec_from_file_location(f"ports_{name}", PORTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_of_a_pair_have_the_same_losses(name):
    torch.manual_seed(0)
    left, right = script(f"{name}_torch"), script(f"{name}_mlx")
    theirs, ours = getattr(left, MODELS[name])(), getattr(right, MODELS[name])()
    load_weights(ours, theirs)
    dataset, own = left.data(rows=96), right.data(rows=96)
    if name == "vae":  # the noise is drawn by each library's own generator
        own = tuple(tensor.numpy() for tensor in dataset.tensors)
    inputs = [tensor[:8] for tensor in dataset.tensors]
    arguments = inputs if name == "vae" else inputs[:1]
    found = compare(theirs, ours, arguments)
    assert found.agrees, str(found)
    expected = left.train(theirs, dataset, epochs=5, shuffle=False)
    got = right.train(ours, own, epochs=5, shuffle=False)
    assert expected[-1] < 0.985 * expected[0]
    np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_both_sides_of_the_lightning_pair_have_the_same_losses():
    pytest.importorskip("lightning", reason="lightning is not installed (pip install lightning)")
    torch.manual_seed(0)
    left, right = script("autoencoder_lightning"), script("autoencoder_mlx")
    theirs, ours = left.Autoencoder(), right.Autoencoder()
    load_weights(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and logging
        expected = left.train(theirs, left.Digits(rows=192, shuffle=False))
    got = right.train(ours, right.Digits(rows=192, shuffle=False))
    assert expected[0][-1] < 0.8 * expected[0][0]
    np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_the_port_of_the_lightning_script_follows_a_loop_in_pytorch():
    """What Lightning would do with the module, where Lightning is not installed."""
    torch.manual_seed(0)
    right = script("autoencoder_mlx")
    ours, data = right.Autoencoder(), right.Digits(rows=192, shuffle=False)
    theirs = torch.nn.Module()
    for name, sizes in (("encoder", (64, 32, 8)), ("decoder", (8, 32, 64))):
        first, last = torch.nn.Linear(*sizes[:2]), torch.nn.Linear(*sizes[1:])
        setattr(theirs, name, torch.nn.Sequential(first, torch.nn.ReLU(), last))
    load_weights(ours, theirs)
    data.setup("fit")
    x, optimizer = torch.tensor(data.train[0]), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    expected = []
    for _ in range(3):
        losses = []
        for rows in x.split(32):
            optimizer.zero_grad()
            loss = ((theirs.decoder(theirs.encoder(rows)) - rows) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected.append(np.mean(losses))
    np.testing.assert_allclose(right.train(ours, data, epochs=3)[0], expected, rtol=2e-4)


def test_every_pair_is_tested():
    found = {path.stem.rpartition("_")[0] for path in PORTS.glob("*.py")}
    assert found == {*MODELS, "autoencoder"}
