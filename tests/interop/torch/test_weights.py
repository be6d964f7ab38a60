"""Weights from real PyTorch layers: the MLX layer then computes the same, and gives them back."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_fit.errors import CheckpointMismatchError, ConfigurationError, DataError
from mlx_fit.interop.torch import export_weights, load_weights

torch = pytest.importorskip("torch")
tnn = torch.nn


def last(x):
    """Channels first to channels last."""
    return np.moveaxis(x, 1, -1)


def as_is(x):
    return x


def outputs(theirs, ours, x, layout=as_is):
    theirs.eval()
    ours.eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x))
    got = ours(mx.array(layout(x)))
    if isinstance(expected, tuple):
        expected, got = expected[0], got[0] if isinstance(got, tuple) else got
    return layout(expected.numpy()), np.array(got)


def shake(module):
    """Random values everywhere, also in norms and their running statistics."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("var") else -0.5
            tensor.uniform_(low, low + 1)


LAYERS = {
    "linear": (tnn.Linear(5, 7), lambda: nn.Linear(5, 7), (3, 5), as_is),
    "linear without bias": (
        tnn.Linear(5, 5, bias=False),
        lambda: nn.Linear(5, 5, bias=False),
        (3, 5),
        as_is,
    ),
    "conv1d": (tnn.Conv1d(4, 6, 3), lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), last),
    "conv2d": (
        tnn.Conv2d(3, 3, (3, 5), padding=1, stride=2),
        lambda: nn.Conv2d(3, 3, (3, 5), padding=1, stride=2),
        (2, 3, 9, 9),
        last,
    ),
    "conv3d": (tnn.Conv3d(2, 3, 3), lambda: nn.Conv3d(2, 3, 3), (1, 2, 5, 6, 7), last),
    "depthwise": (
        tnn.Conv2d(4, 4, 3, groups=4),
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        (2, 4, 6, 6),
        last,
    ),
    "grouped": (
        tnn.Conv1d(4, 6, 3, groups=2),
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        (2, 4, 9),
        last,
    ),
    "transposed 1d": (
        tnn.ConvTranspose1d(4, 4, 3),
        lambda: nn.ConvTranspose1d(4, 4, 3),
        (2, 4, 5),
        last,
    ),
    "transposed 2d": (
        tnn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        (2, 4, 5, 5),
        last,
    ),
    "transposed 3d": (
        tnn.ConvTranspose3d(2, 3, 2),
        lambda: nn.ConvTranspose3d(2, 3, 2),
        (1, 2, 3, 4, 5),
        last,
    ),
    "layer norm": (tnn.LayerNorm(6), lambda: nn.LayerNorm(6), (2, 3, 6), as_is),
    "group norm": (
        tnn.GroupNorm(2, 6),
        lambda: nn.GroupNorm(2, 6, pytorch_compatible=True),
        (2, 6, 4, 4),
        last,
    ),
    "batch norm": (tnn.BatchNorm2d(6), lambda: nn.BatchNorm(6), (2, 6, 4, 4), last),
    "batch norm without weights": (
        tnn.BatchNorm1d(6, affine=False),
        lambda: nn.BatchNorm(6, affine=False),
        (8, 6),
        as_is,
    ),
    "instance norm": (
        tnn.InstanceNorm2d(3, affine=True),
        lambda: nn.InstanceNorm(3, affine=True),
        (2, 3, 4, 4),
        last,
    ),
    "prelu": (tnn.PReLU(), nn.PReLU, (4, 5), as_is),
    "rnn": (tnn.RNN(5, 4, batch_first=True), lambda: nn.RNN(5, 4), (2, 6, 5), as_is),
    "lstm": (tnn.LSTM(5, 4, batch_first=True), lambda: nn.LSTM(5, 4), (2, 6, 5), as_is),
    "gru": (tnn.GRU(5, 4, batch_first=True), lambda: nn.GRU(5, 4), (2, 6, 5), as_is),
    "gru without bias": (
        tnn.GRU(5, 4, batch_first=True, bias=False),
        lambda: nn.GRU(5, 4, bias=False),
        (2, 6, 5),
        as_is,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_same_and_its_weights_come_back(name, rng):
    theirs, make, shape, layout = LAYERS[name]
    shake(theirs)
    ours = make()
    load_weights(ours, theirs.state_dict())
    expected, got = outputs(theirs, ours, rng.normal(size=shape).astype(np.float32), layout)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    back = export_weights(ours, like=theirs)
    assert list(back) == list(theirs.state_dict())
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())
    theirs.load_state_dict(export_weights(ours))  # the plain export, too, is a whole state_dict
    again, _ = outputs(theirs, ours, np.ones(shape, np.float32), layout)
    np.testing.assert_allclose(
        outputs(theirs, ours, np.ones(shape, np.float32), layout)[1], again, rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", LAYERS)
def test_exported_weights_load_to_the_same_bits(name, rng):
    make = LAYERS[name][1]
    ours, other = make(), make()
    load_weights(other, export_weights(ours))
    for (key, array), (_, same) in zip(items(ours), items(other), strict=True):
        assert np.array(array).tobytes() == np.array(same).tobytes(), key


def items(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_a_bilinear_layer_swaps_its_inputs(rng):
    theirs, ours = tnn.Bilinear(3, 4, 5), nn.Bilinear(3, 4, 5)
    load_weights(ours, theirs)
    x, z = rng.normal(size=(2, 3)).astype("f"), rng.normal(size=(2, 4)).astype("f")
    expected = theirs(torch.from_numpy(x), torch.from_numpy(z)).detach().numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(x), mx.array(z))), expected, atol=1e-5)


def test_an_embedding_looks_up_the_same_rows():
    theirs, ours = tnn.Embedding(9, 4), nn.Embedding(9, 4)
    load_weights(ours, theirs)
    ids = np.array([[1, 8], [0, 3]])
    expected = theirs(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_array_equal(np.array(ours(mx.array(ids))), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "apart"])
def test_attention_takes_packed_projections(bias, sizes, rng):
    theirs = tnn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **sizes)
    kdim, vdim = sizes.get("kdim", 8), sizes.get("vdim", 8)
    ours = nn.MultiHeadAttention(8, 2, key_input_dims=kdim, value_input_dims=vdim, bias=bias)
    shake(theirs)
    load_weights(ours, theirs)
    q, k, v = (rng.normal(size=(2, 5, n)).astype("f") for n in (8, kdim, vdim))
    expected, _ = theirs(*map(torch.from_numpy, (q, k, v)))
    got = ours(*map(mx.array, (q, k, v)))
    np.testing.assert_allclose(np.array(got), expected.detach().numpy(), atol=1e-5)
    back = export_weights(ours)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_encoder_with_biased_attention(norm_first, rng):
    layer = tnn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    theirs = tnn.TransformerEncoder(layer, 2, tnn.LayerNorm(8), enable_nested_tensor=False)
    shake(theirs)
    ours = nn.TransformerEncoder(2, 8, 2, 16, norm_first=norm_first)
    with pytest.raises(CheckpointMismatchError, match=r"MultiHeadAttention.*bias=True"):
        load_weights(ours, theirs)
    for block in ours.layers:
        block.attention = nn.MultiHeadAttention(8, 2, bias=True)
    load_weights(ours, theirs)
    x = rng.normal(size=(2, 5, 8)).astype("f")
    expected = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(x), None)), expected, rtol=1e-4, atol=1e-5)
    assert export_weights(ours).keys() == theirs.state_dict().keys()


class Stack(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.lstm = [nn.LSTM(size, 4) for size in sizes]


def test_a_list_of_layers_takes_a_stacked_recurrent_layer(rng):
    theirs = tnn.ModuleDict({"lstm": tnn.LSTM(5, 4, num_layers=2, batch_first=True)})
    ours = Stack([5, 4])
    load_weights(ours, theirs)
    x = rng.normal(size=(2, 6, 5)).astype("f")
    expected = theirs["lstm"](torch.from_numpy(x))[0].detach().numpy()
    hidden = ours.lstm[1](ours.lstm[0](mx.array(x))[0])[0]
    np.testing.assert_allclose(np.array(hidden), expected, atol=1e-5)
    assert export_weights(ours).keys() == theirs.state_dict().keys()


def test_a_list_of_layers_takes_a_bidirectional_layer(rng):
    theirs = tnn.ModuleDict({"lstm": tnn.LSTM(5, 4, bidirectional=True, batch_first=True)})
    ours = Stack([5, 5])
    load_weights(ours, theirs)
    x = rng.normal(size=(2, 6, 5)).astype("f")
    expected = theirs["lstm"](torch.from_numpy(x))[0].detach().numpy()
    forward = ours.lstm[0](mx.array(x))[0]
    backward = ours.lstm[1](mx.array(x[:, ::-1].copy()))[0][:, ::-1]
    np.testing.assert_allclose(
        np.array(mx.concatenate([forward, backward], -1)), expected, atol=1e-5
    )


def test_a_list_of_layers_takes_a_module_list():
    theirs = tnn.ModuleDict({"lstm": tnn.ModuleList([tnn.LSTM(4, 4), tnn.LSTM(4, 4)])})
    ours = Stack([4, 4])
    load_weights(ours, theirs)
    weight = theirs["lstm"][1].weight_hh_l0.detach().numpy()
    np.testing.assert_array_equal(np.array(ours.lstm[1].Wh), weight)


# --- tied weights ---------------------------------------------------------------------------------


class TiedTorch(tnn.Module):
    def __init__(self):
        super().__init__()
        self.wte = tnn.Embedding(7, 4)
        self.head = tnn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight


class Tied(nn.Module):
    def __init__(self, has_head):
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        if has_head:
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.wte.weight


def test_a_tied_head_needs_no_place_of_its_own():
    theirs, ours = TiedTorch(), Tied(has_head=False)
    report = load_weights(ours, theirs)
    assert report.tied == ["head.weight"]
    ours.wte.weight = ours.wte.weight + 1
    back = export_weights(ours, like=theirs)
    assert torch.equal(back["head.weight"], theirs.wte.weight + 1)
    assert back["head.weight"] is back["wte.weight"]


def test_a_tied_head_that_a_file_leaves_out_is_filled_and_stays_tied():
    theirs, ours = TiedTorch(), Tied(has_head=True)
    load_weights(ours, {"wte.weight": theirs.wte.weight})
    assert ours.head.weight is ours.wte.weight
    np.testing.assert_array_equal(np.array(ours.wte.weight), theirs.wte.weight.detach().numpy())
    load_weights(ours, theirs)
    assert ours.head.weight is ours.wte.weight


def test_an_extra_tensor_of_other_values_is_not_tied():
    state = {"wte.weight": torch.zeros(7, 4), "head.weight": torch.ones(7, 4)}
    with pytest.raises(CheckpointMismatchError, match=r"'head.weight' \(7, 4\) has no place"):
        load_weights(Tied(has_head=False), state)


# --- names ----------------------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def named(**layers):
    return tnn.ModuleDict(layers)


@pytest.mark.parametrize("as_function", [False, True])
def test_other_names_go_through_a_table_or_a_function(as_function):
    theirs = named(fc1=tnn.Linear(3, 5), fc2=tnn.Linear(5, 2), junk=tnn.Linear(1, 1))
    table = {"fc1": "0", "fc2": "2", "junk": None}

    def function(name):
        layer, _, rest = name.partition(".")
        return None if table[layer] is None else f"{table[layer]}.{rest}"

    ours = two_layers()
    report = load_weights(ours, theirs, rename=function if as_function else table)
    np.testing.assert_array_equal(np.array(ours.layers[2].weight), theirs["fc2"].weight.detach())
    assert report.ignored == ["junk.weight", "junk.bias"]
    back = export_weights(ours, rename=function if as_function else table, like=theirs)
    assert back.keys() == theirs.state_dict().keys()
    plain = export_weights(ours, rename=table)
    assert list(plain) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_the_beginning_of_all_names_is_empty():
    ours = nn.Module()
    ours.net = two_layers()
    theirs = tnn.Sequential(tnn.Linear(3, 5), tnn.ReLU(), tnn.Linear(5, 2))
    load_weights(ours, theirs, rename={"": "net"})
    assert list(export_weights(ours, rename={"": "net"})) == list(theirs.state_dict())


def test_names_as_in_mlx_are_taken_too():
    theirs = named(layers=tnn.Sequential(tnn.Linear(3, 5), tnn.ReLU(), tnn.Linear(5, 2)))
    ours = two_layers()
    load_weights(ours, theirs)
    for mine, other in ((ours.layers[0], theirs.layers[0]), (ours.layers[2], theirs.layers[2])):
        np.testing.assert_array_equal(mine.weight, other.weight.detach().numpy())


def test_wrappers_of_models_and_checkpoints_are_seen_through():
    theirs = tnn.Sequential(tnn.Linear(3, 5), tnn.ReLU(), tnn.Linear(5, 2))
    state = {f"module._orig_mod.{key}": value for key, value in theirs.state_dict().items()}
    load_weights(two_layers(), {"epoch": 3, "state_dict": state})


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"nothing": "0"}, "nothing.*no name.*0.weight"),
        (lambda name: "same", "'same' for both '0.weight' and '0.bias'"),
        (lambda name: 3, "gives 3 for '0.weight'"),
        (["a"], "rename is a list"),
    ],
)
def test_a_rename_that_cannot_work_is_refused(rename, message):
    theirs = tnn.Sequential(tnn.Linear(3, 5))
    with pytest.raises(ConfigurationError, match=message):
        load_weights(nn.Sequential(nn.Linear(3, 5)), theirs, rename=rename)


def test_a_function_is_not_read_backwards():
    with pytest.raises(ConfigurationError, match="give like="):
        export_weights(two_layers(), rename=str.lower)


# --- what does not fit ----------------------------------------------------------------------------


def test_nothing_is_loaded_half_and_the_nearest_names_are_told():
    ours = two_layers()
    before = [(key, array) for key, array in items(ours)]
    state = {
        "0.weight": torch.ones(5, 3),
        "0.bias": torch.ones(4),
        "2.bias": torch.ones(2),
        "last.weight": torch.ones(2, 5),
    }
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(ours, state)
    text = str(caught.value)
    assert "'layers.0.bias' (5,): torch's '0.bias' is (4,), expected (5,)" in text
    assert "there is no '2.weight' (2, 5); nearest: 'last.weight' (2, 5)" in text
    assert "'last.weight' (2, 5) has no place" in text
    assert caught.value.missing == ["layers.2.weight"]
    assert caught.value.extra == ["last.weight"]
    assert caught.value.misshapen == {"layers.0.bias": ((4,), (5,))}
    assert all(array is now for (_, array), (_, now) in zip(before, items(ours), strict=True))


def test_without_strictness_what_is_there_is_loaded_and_the_rest_told():
    ours = two_layers()
    kept = ours.layers[2].weight
    state = {"0.weight": torch.ones(5, 3), "0.bias": torch.ones(5), "other": torch.ones(1)}
    report = load_weights(ours, state, strict=False)
    assert report.missing == ["layers.2.bias", "layers.2.weight"]
    assert report.ignored == ["other"]
    assert ours.layers[2].weight is kept
    with pytest.raises(CheckpointMismatchError, match="expected"):
        load_weights(ours, {"0.weight": torch.ones(5, 4)}, strict=False)


def test_a_transposed_matrix_is_recognised():
    with pytest.raises(CheckpointMismatchError, match="looks transposed"):
        load_weights(nn.Linear(3, 5), {"weight": torch.ones(3, 5), "bias": torch.ones(5)})


def test_a_quantized_model_is_refused():
    ours = nn.Sequential(nn.Linear(64, 64))
    nn.quantize(ours)
    with pytest.raises(ConfigurationError, match=r"layers\.0 is a QuantizedLinear"):
        load_weights(ours, tnn.Sequential(tnn.Linear(64, 64)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "a"}, "model is a str"),
        ({"source": 3}, "source is a int"),
        ({"source": "weights.npz"}, "is no file"),
        ({"source": {1: np.ones(2)}}, "the key 1"),
        ({"source": {"weight": [1]}}, r"source\['weight'\] is a list"),
        ({"strict": "no"}, "strict='no'"),
        ({"dtype": mx.int32}, "floating"),
    ],
)
def test_arguments_are_checked(arguments, message):
    given = {"model": nn.Linear(2, 2), "source": {}} | arguments
    with pytest.raises((ConfigurationError, DataError), match=message):
        load_weights(given.pop("model"), given.pop("source"), **given)


# --- files and dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_files_are_written_and_read(name, tmp_path):
    ours, other = two_layers(), two_layers()
    assert export_weights(ours, tmp_path / "deep" / name) == tmp_path / "deep" / name
    load_weights(other, str(tmp_path / "deep" / name))
    pairs = zip(items(ours), items(other), strict=True)
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]


def test_a_safetensors_file_is_read_by_its_own_library(tmp_path):
    from safetensors.torch import load_file

    ours = nn.Sequential(nn.Conv2d(3, 4, 5))
    state = load_file(export_weights(ours, tmp_path / "w.safetensors"))
    expected = np.moveaxis(np.array(ours.layers[0].weight), -1, 1)
    np.testing.assert_array_equal(state["0.weight"].numpy(), expected)


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_is_never_run(tmp_path, capsys):
    torch.save({"weight": torch.ones(2, 2), "x": Harmful()}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="weights_only=True"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "unpickled" not in capsys.readouterr().out


def test_an_empty_file_of_torch_is_told(tmp_path):
    (tmp_path / "w.pt").touch()
    with pytest.raises(DataError, match=r"w\.pt.*cannot read this file"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_other_numbers_do_not_take_the_place_of_floats(dtype):
    theirs, ours = tnn.Linear(2, 2).state_dict(), nn.Linear(2, 2)
    before = np.array(ours.weight)
    with pytest.raises(DataError, match=r"float32 in the model and (int8|complex64) in the"):
        load_weights(ours, theirs | {"weight": theirs["weight"].to(dtype)})
    assert np.array_equal(ours.weight, before)


def test_a_lazy_layer_without_shape_is_told():
    with pytest.raises(DataError, match=r"'weight'.*Call the torch model once"):
        load_weights(nn.Linear(2, 2), tnn.LazyLinear(2))


def test_a_file_cut_short_is_no_safetensors_file(tmp_path):
    path = export_weights(two_layers(), tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"w\.safetensors"):
        load_weights(two_layers(), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits_unless_a_dtype_is_given(dtype):
    theirs, ours = tnn.Linear(3, 5).to(dtype), nn.Linear(3, 5)
    load_weights(ours, theirs)
    back = export_weights(ours)
    assert back["weight"].dtype == dtype
    assert torch.equal(back["weight"], theirs.weight)
    load_weights(ours, theirs, dtype=mx.float32)
    assert ours.weight.dtype == mx.float32


def test_double_precision_becomes_single():
    ours = nn.Linear(3, 5)
    report = load_weights(ours, tnn.Linear(3, 5).double())
    assert ours.weight.dtype == mx.float32
    assert report.loaded[0].dtype == "float32"


def test_the_report_is_a_table():
    theirs = tnn.Sequential(tnn.Conv2d(3, 8, 5), tnn.BatchNorm2d(8))
    lines = str(load_weights(nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm(8)), theirs))
    assert "layers.0.weight        (8, 5, 5, 3)  float32  0.weight" in lines
    assert "channels last" in lines
    assert lines.endswith("ignored: 1.num_batches_tracked")


def test_running_statistics_stay_frozen():
    ours = nn.Sequential(nn.BatchNorm(4))
    load_weights(ours, tnn.Sequential(tnn.BatchNorm1d(4)))
    assert set(ours.layers[0].trainable_parameters()) == {"weight", "bias"}
