"""The checker on real models of PyTorch and MLX: silent on twins, and names what was changed."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit.errors import ConfigurationError
from mlx_fit.interop.torch import compare, load_weights, optimizers, param_groups

torch = pytest.importorskip("torch")
tnn = torch.nn
F = torch.nn.functional


class TorchBlock(tnn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = tnn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = tnn.BatchNorm2d(channels)
        self.conv2 = tnn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = tnn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Block(nn.Module):
    def __init__(self, channels, has_relu=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm(channels)
        self.has_relu = has_relu

    def __call__(self, x):
        y = nn.relu(self.bn1(self.conv1(x)))
        y = x + self.bn2(self.conv2(y))
        return nn.relu(y) if self.has_relu else y


class TorchCNN(tnn.Module):
    def __init__(self):
        super().__init__()
        self.stem = tnn.Sequential(tnn.Conv2d(3, 6, 3, padding=1), tnn.MaxPool2d(2))
        self.blocks = tnn.ModuleList([TorchBlock(6), TorchBlock(6)])
        self.head = tnn.Linear(6 * 16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))


class CNN(nn.Module):
    def __init__(self, transposes=True, has_relu=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2))
        self.blocks = [Block(6), Block(6, has_relu)]
        self.head = nn.Linear(6 * 16, 5)
        self.transposes = transposes

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.transpose(0, 3, 1, 2) if self.transposes else x
        return self.head(x.reshape(len(x), -1))


@pytest.fixture
def images(rng):
    return rng.normal(size=(4, 3, 8, 8)).astype(np.float32)


def loaded(theirs, ours, **options):
    load_weights(ours, theirs, **options)
    return theirs, ours


@pytest.mark.parametrize("training", [False, True])
def test_a_residual_network_agrees(training, images):
    found = compare(*loaded(TorchCNN(), CNN()), images, training=training)
    assert found.agrees, str(found)
    assert found.first is None
    assert {row.name for row in found.layers} >= {"stem.layers.0", "blocks.1.bn2", "blocks.0", ""}
    assert len(found.gradients) == len(list(TorchCNN().parameters()))
    assert len(found.buffers) == (8 if training else 0)


def test_both_models_are_left_as_they_were(images):
    theirs, ours = loaded(TorchCNN(), CNN())
    ours.head.eval()
    kinds = [type(layer) for layer in ours.modules()]
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    mean = ours.blocks[0].bn1.running_mean
    compare(theirs, ours, images, training=True)
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())
    assert theirs.training
    assert all(parameter.grad is None for parameter in theirs.parameters())
    assert ours.blocks[0].bn1.running_mean is mean
    assert ours.training
    assert not ours.head.training
    assert [type(layer) for layer in ours.modules()] == kinds


def test_a_flatten_of_channels_last_is_found(images):
    found = compare(*loaded(TorchCNN(), CNN(transposes=False)), images)
    assert found.first.name == "head"
    assert "transpose before the flatten" in found.first.reasons[0]
    assert not found
    assert "First difference: output of 'head' (Linear)" in str(found)


def test_code_around_layers_is_told_from_the_layers(images):
    found = compare(*loaded(TorchCNN(), CNN(has_relu=False)), images)
    assert found.first.name == "blocks.1"
    assert "the layers inside of it agree" in found.first.reasons[0]


def test_weights_that_were_never_loaded_are_named(images):
    found = compare(TorchCNN(), CNN(), images)
    assert found.first.name == "stem.layers.0"
    assert "stem.layers.0.weight" in found.first.reasons[0]
    assert "load_weights" in found.first.reasons[0]
    assert "head.weight" in found.weights


CHANGED = {
    "epsilon": (tnn.LayerNorm(6, eps=1e-2), nn.LayerNorm(6), (4, 6), "epsilon: PyTorch 0.01"),
    "gelu": (tnn.GELU("tanh"), nn.GELU(), (4, 60), r"GELU variant.*nn.GELU\('precise'\)"),
    "gelu, the other way": (tnn.GELU(), nn.GELU("tanh"), (4, 60), r"nn.GELU\('none'\)"),
    "padding": (
        tnn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3),
        (2, 3, 6, 6),
        r"padding: PyTorch \(1, 1\), MLX \(0, 0\)",
    ),
    "stride": (tnn.Conv1d(3, 4, 3, stride=2), nn.Conv1d(3, 4, 3), (2, 3, 9), "stride"),
    "padding mode": (
        tnn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding=1),
        (2, 3, 6, 6),
        "'reflect'",
    ),
    "groups of a norm": (tnn.GroupNorm(2, 6), nn.GroupNorm(2, 6), (2, 6, 4, 4), "pytorch_compat"),
    "slope": (tnn.LeakyReLU(0.2), nn.LeakyReLU(), (2, 6), "negative slope: PyTorch 0.2"),
    "type": (tnn.ReLU(), nn.Tanh(), (2, 6), "type: PyTorch has ReLU here, MLX Tanh"),
    "ceil mode": (
        tnn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2),
        (2, 3, 5, 5),
        "ceil_mode",
    ),
    "padded averages": (
        tnn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 1, 1),
        (2, 3, 5, 5),
        "count_include_pad",
    ),
    "axis": (tnn.Softmax(dim=1), nn.Softmax(), (2, 3, 4), "axis: PyTorch takes"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_that_differs_is_named(name, rng):
    theirs, ours, shape, message = CHANGED[name]
    theirs, ours = tnn.Sequential(tnn.Identity(), theirs), nn.Sequential(nn.Identity(), ours)
    load_weights(ours, theirs)
    x = rng.normal(size=shape).astype(np.float32)
    other = np.moveaxis(x, 1, -1) if len(shape) == 4 or name == "stride" else x
    found = compare(theirs, ours, x, mlx_inputs=other)
    assert found.first.name == "layers.1"
    assert re.search(message, " ".join(found.first.reasons))


def test_momentum_of_another_convention_is_named(rng):
    theirs, ours = loaded(
        tnn.Sequential(tnn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm(3, momentum=0.9))
    )
    x = rng.normal(2, size=(8, 3)).astype(np.float32)
    assert compare(theirs, ours, x).agrees  # evaluation does not use it
    found = compare(theirs, ours, x, training=True)
    assert found.first.name == "layers.0.running_mean"
    assert "momentum" in str(found)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.factor = factor

    def __call__(self, x):
        return self.fc(x) * self.factor


def test_a_factor_is_named(rng):
    theirs = tnn.ModuleDict({"fc": tnn.Linear(4, 3)})
    theirs.forward = lambda x: theirs["fc"](x)
    found = compare(*loaded(theirs, Scaled(0.25)), rng.normal(size=(2, 4)).astype("f"))
    assert found.first.name == ""
    assert "0.25 times PyTorch's" in " ".join(found.first.reasons)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        outputs = self.layer(x)
        return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_gradients_of_recurrent_layers_agree(kind, rng):
    theirs = tnn.ModuleDict({"layer": getattr(tnn, kind)(3, 4, batch_first=True)})
    theirs.forward = lambda x: theirs["layer"](x)[0]
    ours = Recurrent(getattr(nn, kind)(3, 4))
    found = compare(*loaded(theirs, ours), rng.normal(size=(2, 5, 3)).astype("f"))
    assert len(found.gradients) == (4 if kind == "GRU" else 3)
    assert found.agrees, str(found)


class TorchTagger(tnn.Module):
    def __init__(self):
        super().__init__()
        self.embed = tnn.Embedding(11, 6)
        self.lstm = tnn.LSTM(6, 5, batch_first=True)
        self.out = tnn.Linear(5, 3)

    def forward(self, tokens):
        return self.out(self.lstm(self.embed(tokens))[0])


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5)
        self.out = nn.Linear(5, 3)

    def __call__(self, tokens):
        return self.out(self.lstm(self.embed(tokens))[0])


def test_an_lstm_tagger_agrees(rng):
    found = compare(*loaded(TorchTagger(), Tagger()), rng.integers(0, 11, size=(2, 7)))
    assert found.agrees, str(found)
    assert "lstm.bias" in [row.name for row in found.gradients]


def test_a_transformer_encoder_agrees(rng):
    layer = tnn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
    theirs = tnn.TransformerEncoder(layer, 2, tnn.LayerNorm(8), enable_nested_tensor=False)
    ours = nn.TransformerEncoder(2, 8, 2, 16)
    for block in ours.layers:
        block.attention = nn.MultiHeadAttention(8, 2, bias=True)
    x = rng.normal(size=(2, 5, 8)).astype("f")
    found = compare(*loaded(theirs, ours), x, mlx_inputs=(x, None))
    assert found.agrees, str(found)
    assert "layers.0.attention.query_proj.weight" in [row.name for row in found.gradients]


class TorchGPT(tnn.Module):
    def __init__(self):
        super().__init__()
        self.wte = tnn.Embedding(13, 8)
        self.ln = tnn.LayerNorm(8)
        self.qkv = tnn.Linear(8, 24)
        self.head = tnn.Linear(8, 13, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        q, k, v = self.qkv(self.ln(x)).chunk(3, -1)
        x = (
            x
            + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[
                :, 0
            ]
        )
        return self.head(x)


class GPT(nn.Module):
    def __init__(self, mask="causal"):
        super().__init__()
        self.wte = nn.Embedding(13, 8)
        self.ln = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mask = mask

    def __call__(self, tokens):
        x = self.wte(tokens)
        q, k, v = mx.split(self.qkv(self.ln(x)), 3, -1)
        q, k, v = (part[:, None] for part in (q, k, v))
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=self.mask)
        return self.wte.as_linear(x + attended[:, 0])


def test_a_gpt_with_tied_weights_agrees(rng):
    found = compare(*loaded(TorchGPT(), GPT()), rng.integers(0, 13, size=(2, 7)))
    assert found.agrees, str(found)


def test_a_missing_mask_is_found_outside_of_the_layers(rng):
    found = compare(*loaded(TorchGPT(), GPT(mask=None)), rng.integers(0, 13, size=(2, 7)))
    assert found.first.name == ""
    assert "masks" in found.first.reasons[0]


class TorchUNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.down = tnn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.up = tnn.ConvTranspose2d(4, 4, 2, stride=2)
        self.out = tnn.Conv2d(6, 1, 1)

    def forward(self, x):
        return self.out(torch.cat([x, self.up(F.relu(self.down(x)))], 1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.out = nn.Conv2d(6, 1, 1)

    def __call__(self, x):
        return self.out(mx.concatenate([x, self.up(nn.relu(self.down(x)))], -1))


def test_a_unet_agrees(rng):
    found = compare(*loaded(TorchUNet(), UNet()), torch.randn(2, 2, 8, 8))
    assert found.agrees, str(found)


def test_other_names_are_paired_by_the_table(rng):
    theirs = tnn.Sequential(tnn.Linear(3, 5), tnn.Linear(5, 2))
    ours = Named()
    table = {"0": "first", "1": "second"}
    load_weights(ours, theirs, rename=table)
    x = rng.normal(size=(2, 3)).astype("f")
    for rename in (table, lambda name: name.replace("0.", "first.").replace("1.", "second.")):
        found = compare(theirs, ours, x, rename=rename)
        assert [row.torch_name for row in found.layers] == ["0", "1", ""]
        assert found.agrees, str(found)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 2)

    def __call__(self, x):
        return self.second(self.first(x))


def test_settings_of_optimizers_are_compared(rng):
    theirs, ours = loaded(tnn.Linear(3, 2), nn.Linear(3, 2))
    x = np.ones((1, 3), np.float32)
    pair = (torch.optim.AdamW(theirs.parameters(), 1e-3), optim.AdamW(1e-3))
    found = compare(theirs, ours, x, optimizers=pair)
    assert "bias correction: PyTorch True, MLX False" in " ".join(found.notes)
    assert not found.agrees
    pair = (pair[0], optim.AdamW(1e-3, weight_decay=0.01, bias_correction=True))
    assert compare(theirs, ours, x, optimizers=pair).agrees


def test_groups_of_optimizers_are_compared_one_by_one():
    theirs, ours = loaded(tnn.Linear(3, 2), nn.Linear(3, 2))
    x = np.ones((1, 3), np.float32)
    groups = [{"params": [theirs.weight]}, {"params": [theirs.bias], "lr": 0.01}]
    given = torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def notes(rate):
        table = [{"params": "bias", "lr": rate}]
        made = param_groups(ours, optimizers.SGD, table, lr=0.1, momentum=0.9)
        return compare(theirs, ours, x, optimizers=(given, made)).notes

    assert notes(0.01) == []
    assert len(notes(0.03)) == 1
    assert "learning rate: PyTorch 0.01, MLX 0.03" in notes(0.03)[0]
    plain = compare(theirs, ours, x, optimizers=(given, optimizers.SGD(0.1, 0.9))).notes
    assert ["groups: PyTorch has 2, MLX 1" in note for note in plain] == [True]


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("Adam", "amsgrad"),
        ("RMSprop", "centered"),
        ("SGD", "maximize"),
        ("Adam", "decoupled_weight_decay"),
    ],
)
def test_options_of_optimizers_that_change_the_update_are_compared(kind, option):
    theirs, ours = loaded(tnn.Linear(3, 2), nn.Linear(3, 2))
    given = getattr(torch.optim, kind)(theirs.parameters(), lr=0.1, **{option: True})
    pair = (given, getattr(optimizers, kind)(0.1))
    notes = compare(theirs, ours, np.ones((1, 3), np.float32), optimizers=pair).notes
    assert notes == [f"optimizer: {option.replace('_', ' ')}: PyTorch True, MLX False"]


def test_inputs_are_left_as_they_were():
    class InPlace(tnn.Linear):
        def forward(self, x):
            x += 1
            return super().forward(x)

    theirs, ours = loaded(InPlace(3, 2), nn.Linear(3, 2))
    x = np.ones((1, 3), np.float32)
    compare(theirs, ours, x)
    assert np.array_equal(x, np.ones((1, 3)))


def test_values_that_are_not_finite_are_noted():
    theirs = tnn.Linear(3, 2)
    theirs.weight.data[0, 0] = float("nan")
    found = compare(*loaded(theirs, nn.Linear(3, 2)), np.ones((1, 3), np.float32))
    assert found.first is None
    assert "NaN" in found.notes[0]
    assert not found.agrees


class TorchTwice(tnn.Module):
    def __init__(self):
        super().__init__()
        self.last = tnn.Linear(3, 3)
        self.first = self.last

    def forward(self, x, scale=1.0):
        return {"out": self.last(self.first(x)) * scale}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3)
        self.first = self.last

    def __call__(self, x, scale=1.0):
        return {"out": self.last(self.first(x)) * scale}


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_layer_that_is_shared_and_called_twice_agrees(as_dict):
    x = np.ones((2, 3), np.float32)
    inputs = {"x": x, "scale": 2.0} if as_dict else [x, 2.0]
    found = compare(*loaded(TorchTwice(), Twice()), inputs)
    assert [row.name for row in found.layers] == ["first", "first", ""]
    assert found.agrees, str(found)


def test_only_the_end_of_a_stack_is_an_output_in_torch(rng):
    theirs = tnn.ModuleDict({"lstm": tnn.LSTM(5, 4, num_layers=2, batch_first=True)})
    theirs.forward = lambda x: theirs["lstm"](x)[0]
    found = compare(*loaded(theirs, Stack()), rng.normal(size=(2, 6, 5)).astype("f"))
    assert [row.name for row in found.layers] == ["lstm.1", ""]
    assert found.unpaired == ["lstm.0"]
    assert found.agrees, str(found)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = [nn.LSTM(5, 4), nn.LSTM(4, 4)]

    def __call__(self, x):
        return self.lstm[1](self.lstm[0](x)[0])[0]


def test_the_tolerance_decides(rng):
    theirs, ours = loaded(tnn.Linear(3, 2), nn.Linear(3, 2))
    ours.weight = ours.weight + 1e-3
    x = np.ones((1, 3), np.float32)
    assert not compare(theirs, ours, x, gradients=False)
    found = compare(theirs, ours, x, gradients=False, atol=0.1)
    assert found.agrees
    assert found.gradients == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_model": nn.Linear(1, 1)}, "torch_model is a Linear"),
        ({"mlx_model": tnn.Linear(1, 1)}, "mlx_model is a Linear"),
        ({"rtol": -1}, "rtol=-1"),
        ({"training": 1}, "training=1"),
        ({"optimizers": 3}, "optimizers"),
        ({"optimizers": (torch.optim.SGD(tnn.Linear(1, 1).parameters()), None)}, "optimizers"),
        ({"inputs": np.ones((0, 1), np.float32)}, "hold no rows"),
    ],
)
def test_arguments_are_checked(arguments, message):
    given = {"torch_model": tnn.Linear(1, 1), "mlx_model": nn.Linear(1, 1)}
    given |= {"inputs": np.ones((1, 1), np.float32)} | arguments
    with pytest.raises(ConfigurationError, match=message):
        compare(**given)


def test_of_a_frozen_model_the_outputs_are_compared():
    theirs, ours = loaded(tnn.Linear(3, 2), nn.Linear(3, 2))
    ours.freeze()
    found = compare(theirs, ours, np.ones((1, 3), np.float32))
    assert [row.agrees for row in found.layers] == [True]
    assert not found.agrees  # of gradients nothing is known
    assert "every parameter of the MLX model is frozen" in " ".join(found.notes)
