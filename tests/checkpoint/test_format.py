"""What a checkpoint holds, and that nothing else is taken for one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mlx_fit import (
    Callback,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointPolicy,
    ConfigurationError,
    EarlyStopping,
    NonFiniteLossError,
    Trainer,
)
from mlx_fit.checkpoint.arrays import read_file, write_file
from mlx_fit.checkpoint.codec import Encoder, decode
from mlx_fit.checkpoint.format import read_checkpoint

DTYPES = [
    *(mx.bool_, mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64),
    *(mx.float16, mx.bfloat16, mx.float32, mx.complex64),
]


def trainer_of(model=None, **options):
    mx.random.seed(1)
    model = model or nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return Trainer(model, optim.Adam(0.01), "mse", batch_size=2, seed=0, **options)


def data(rows=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 4)).astype(np.float32), np.zeros((rows, 2), np.float32)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after two epochs."""
    trainer_of().fit(data(), epochs=2, verbose=0, checkpoint_dir=tmp_path)
    return tmp_path / "step-00000008"


def document_of(folder):
    return json.loads((folder / "state.json").read_text())


def reseal(folder, change):
    """Write another state.json, with a hash that agrees: what a hostile author would do."""
    document = document_of(folder)
    document.pop("sha256")
    change(document)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    text = ("{\n" + ",\n".join(lines)).encode()
    digest = hashlib.sha256(text).hexdigest()
    (folder / "state.json").write_bytes(text + f',\n  "sha256": "{digest}"\n}}\n'.encode())


def rehash(folder, name):
    """Let the manifest agree with a changed file."""
    content = (folder / name).read_bytes()
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(folder, lambda document: document["files"].update({name: facts}))


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_goes_into_a_file_and_back(tmp_path, dtype):
    values = mx.array(np.arange(24).reshape(4, 6)).astype(dtype)
    arrays = {"plain": values, "turned": values.T, "part": values[1:3, ::2], "none": values[:0]}
    arrays["scalar"] = values[0, 1]
    mx.eval(arrays)
    facts = write_file(tmp_path / "a.safetensors", arrays)
    assert facts["size"] == (tmp_path / "a.safetensors").stat().st_size
    for reader in (
        read_file(tmp_path / "a.safetensors", facts),
        mx.load(str(tmp_path / "a.safetensors")),
    ):
        assert reader.keys() == arrays.keys()
        for name, array in arrays.items():
            assert reader[name].dtype == dtype
            assert mx.array_equal(reader[name], array)


def test_the_files_are_plain_safetensors(saved):
    arrays = load_file(saved / "model.safetensors")
    loaded = trainer_of()
    loaded.load(saved)
    np.testing.assert_array_equal(arrays["layers.0.weight"], loaded.model.layers[0].weight)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_file_holds_non_finite_weights(tmp_path, dtype, bad):
    trainer = trainer_of()
    weight = np.ones((3, 4), np.float32)
    weight[2, 3] = bad
    trainer.model.layers[0].weight = mx.array(weight).astype(dtype)
    with pytest.raises(NonFiniteLossError, match=r"layers\.0\.weight"):
        trainer.save(tmp_path / "all")
    assert not list(tmp_path.iterdir())


# --- plain values --------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.just("$float"), inner)
    ),
    max_leaves=20,
)


@given(plain)
@settings(max_examples=200, deadline=None)
def test_plain_values_of_any_kind_come_back_as_they_were(value):
    text = json.dumps(Encoder().encode(value, "value"), allow_nan=False)
    assert repr(decode(json.loads(text), {})) == repr(value)


@pytest.mark.parametrize("inline", [0, 100])
def test_arrays_in_plain_values_come_back_bit_for_bit(inline):
    value = {
        "mlx": mx.array([1.1, math.nan, -0.0, math.inf]),
        "half": mx.array([0.1, 2.0], mx.bfloat16),
        "scalar": mx.array(3, mx.uint64),
        "numpy": np.array([0.1, 1e300]),
        "words": np.arange(4, dtype=np.uint64) << np.uint64(60),
        "numpy scalar": np.float64(0.1),
        "deep": [({"x": mx.array([True, False])},)],
    }
    encoder = Encoder(inline)
    text = json.dumps(encoder.encode(value, "v"), allow_nan=False)
    mx.eval(encoder.arrays)
    found = decode(json.loads(text), encoder.arrays)
    for name in ("mlx", "half", "scalar"):
        assert found[name].dtype == value[name].dtype
        assert bytes(
            memoryview(found[name].view(mx.uint8) if found[name].ndim else found[name])
        ) == (bytes(memoryview(value[name].view(mx.uint8) if value[name].ndim else value[name])))
    for name in ("numpy", "words"):
        assert found[name].dtype == value[name].dtype
        assert found[name].tobytes() == value[name].tobytes()
    assert found["numpy scalar"] == 0.1
    assert found["deep"][0][0]["x"].tolist() == [True, False]


def test_names_with_dots_do_not_collide():
    encoder = Encoder()
    value = {"a.b": mx.array([1.0]), "a": {"b": mx.array([2.0])}}
    document = encoder.encode(value, "s")
    found = decode(document, encoder.arrays)
    assert (found["a.b"].item(), found["a"]["b"].item()) == (1.0, 2.0)


def test_what_cannot_be_saved_is_named():
    with pytest.raises(ConfigurationError, match=r"callbacks\.Mine\.things\.1 is a set"):
        Encoder().encode({"things": [1, {2}]}, "callbacks.Mine")


# --- damage --------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_anywhere_is_noticed(saved, name):
    content = (saved / name).read_bytes()
    rng = np.random.default_rng(0)
    for position in {0, 8, len(content) - 1, *rng.integers(0, len(content), 60).tolist()}:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        (saved / name).write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError):
            read_checkpoint(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_file_is_noticed(saved, name):
    content = (saved / name).read_bytes()
    for length in (0, 1, 7, 8, len(content) // 2, len(content) - 1):
        (saved / name).write_bytes(content[:length])
        with pytest.raises(CheckpointCorruptError) as raised:
            read_checkpoint(saved)
        assert str(saved / name) in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        trainer_of().load(saved)


def test_a_damaged_file_says_what_was_expected_and_found(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError) as raised:
        trainer_of().fit(data(), epochs=3, verbose=0, resume=saved)
    assert raised.value.path == str(path)
    assert raised.value.got == hashlib.sha256(content).hexdigest()
    assert raised.value.expected == document_of(saved)["files"]["model.safetensors"]["sha256"]


# --- hostile checkpoints -------------------------------------------------------------------------


def _traversal(folder):
    reseal(
        folder, lambda d: d["files"].update({"../secret.safetensors": {"size": 1, "sha256": ""}})
    )


def _absolute(folder):
    reseal(folder, lambda d: d["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}))


def _symlink(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def _symlinked_state(folder):
    outside = folder.parent / "outside.json"
    (folder / "state.json").rename(outside)
    (folder / "state.json").symlink_to(outside)


def _huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    rehash(folder, "model.safetensors")


def _lying_header(folder):
    header = {"layers.0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    rehash(folder, "model.safetensors")


def _overlap(folder):
    header = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("one", "two")
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    rehash(folder, "model.safetensors")


def _nan(folder):
    path = folder / "state.json"
    text = path.read_bytes().replace(b'"step": 8', b'"step": NaN', 1)
    body = text[: text.rindex(b',\n  "sha256"')]
    digest = hashlib.sha256(body).hexdigest()
    path.write_bytes(body + f',\n  "sha256": "{digest}"\n}}\n'.encode())


def _nested(folder):
    path = folder / "state.json"
    body = b'{\n  "format": ' + b"[" * 100_000
    digest = hashlib.sha256(body).hexdigest()
    path.write_bytes(body + f',\n  "sha256": "{digest}"\n}}\n'.encode())


def _changed(**values):
    return lambda folder: reseal(folder, lambda document: document.update(values))


HOSTILE = {
    "path traversal": _traversal,
    "absolute path": _absolute,
    "symbolic link": _symlink,
    "symbolic link of the state": _symlinked_state,
    "header of 2^62 bytes": _huge_header,
    "header that lies about shapes": _lying_header,
    "overlapping arrays": _overlap,
    "NaN in JSON": _nan,
    "nested JSON": _nested,
    "another format": _changed(format=99),
    "no list": _changed(random_key="key"),
    "a huge key": _changed(random_key=[2**64, 0]),
    "negative step": _changed(step=-1),
    "step of text": _changed(step="8"),
    "files of text": _changed(files="all"),
    "position of text": _changed(position="here"),
    "an array that is not there": _changed(callbacks={"A": {"$array": {"name": "x"}}}),
    "an unknown tag": _changed(callbacks={"A": {"$object": "os.system"}}),
    "an array too large": _changed(
        position={"a": {"$array": {"dtype": "float32", "shape": [2**40], "values": [1]}}}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_nothing_outside_is_touched(saved, name):
    outside = saved.parent / "secret.safetensors"
    outside.write_bytes(b"mine")
    HOSTILE[name](saved)
    trainer = trainer_of()
    before = trainer.model.layers[0].weight.tolist()
    with pytest.raises(CheckpointCorruptError):
        trainer.load(saved)
    assert trainer.model.layers[0].weight.tolist() == before
    assert outside.read_bytes() == b"mine"


NONSENSE = {
    "no position": {"position": {}},
    "another position": {"position": {"feed": 1, "epoch": "x", "phase": 3, "first_step": None}},
    "history": {"history": {"rows": 1}},
    "callbacks": {"callbacks": {"EarlyStopping": 7}},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_state_that_makes_no_sense_is_a_typed_error(saved, name):
    reseal(saved, lambda document: document.update(NONSENSE[name]))
    with pytest.raises((CheckpointCorruptError, CheckpointMismatchError)):
        trainer_of().fit(data(), epochs=3, verbose=0, resume=saved, callbacks=EarlyStopping("loss"))


def test_a_state_json_that_is_a_pipe_does_not_hang(saved):
    (saved / "state.json").unlink()
    os.mkfifo(saved / "state.json")
    with pytest.raises(CheckpointCorruptError):
        read_checkpoint(saved)


# --- what does not fit ---------------------------------------------------------------------------


def test_another_model_is_refused_with_every_name(saved):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2, bias=False))
    trainer = trainer_of(model)
    with pytest.raises(CheckpointMismatchError) as raised:
        trainer.load(saved)
    assert raised.value.extra == ["layers.1.bias"]
    assert raised.value.misshapen["layers.0.weight"] == ((3, 4), (5, 4))


def test_another_optimizer_is_refused_and_nothing_is_loaded(saved):
    trainer = trainer_of()
    trainer.optimizer = optim.SGD(0.1, momentum=0.9)
    before = trainer.model.layers[0].weight.tolist()
    with pytest.raises(CheckpointMismatchError, match="optimizer"):
        trainer.fit(data(), epochs=3, verbose=0, resume=saved)
    assert trainer.model.layers[0].weight.tolist() == before


class Keeper(Callback):
    def __init__(self, wants="count"):
        self.wants, self.count = wants, 0

    def on_epoch_end(self, epoch, logs):
        self.count += 1

    def state_dict(self):
        return {self.wants: self.count}

    def load_state_dict(self, state):
        self.count = state[self.wants]


def test_a_callback_that_cannot_take_its_state_is_named(tmp_path):
    trainer_of().fit(data(), epochs=1, verbose=0, checkpoint_dir=tmp_path, callbacks=Keeper())
    with pytest.raises(CheckpointMismatchError, match=r"Keeper.*count"):
        trainer_of().fit(
            data(),
            epochs=2,
            verbose=0,
            checkpoint_dir=tmp_path,
            callbacks=Keeper("other"),
            resume=True,
        )


def test_two_callbacks_of_a_class_get_their_own_states_back(tmp_path):
    first, second = Keeper(), Keeper()
    second.count = 10
    arguments = {"verbose": 0, "checkpoint_dir": tmp_path}
    trainer_of().fit(data(), epochs=2, callbacks=[first, second], **arguments)
    first, second = Keeper(), Keeper()
    trainer_of().fit(data(), epochs=3, callbacks=[first, second], resume=True, **arguments)
    assert (first.count, second.count) == (3, 13)


# --- frozen parameters ---------------------------------------------------------------------------


class Based(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 8)
        self.norm = nn.BatchNorm(8)
        self.head = nn.Linear(8, 2)
        self.base.freeze()
        self.norm.freeze()

    def __call__(self, x):
        return self.head(self.norm(self.base(x)))


def based(seed=3):
    mx.random.seed(seed)
    model = Based()
    mx.eval(model.parameters())
    return trainer_of(model)


def test_a_frozen_base_is_not_written_again_but_expected(tmp_path):
    policy = CheckpointPolicy(frozen="expect")
    whole = based()
    whole.fit(data(), epochs=3, verbose=0)
    based().fit(data(), epochs=2, verbose=0, checkpoint_dir=tmp_path, checkpoint_every=policy)
    names = load_file(tmp_path / "step-00000008" / "model.safetensors").keys()
    # Running statistics change though they are frozen.
    assert names == {
        *("head.weight", "head.bias", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var"),
    }
    again = based()
    again.fit(
        data(), epochs=3, verbose=0, checkpoint_dir=tmp_path, checkpoint_every=policy, resume=True
    )
    for mine, theirs in zip(again.model.head.values(), whole.model.head.values(), strict=True):
        assert mx.array_equal(mine, theirs) if isinstance(mine, mx.array) else mine == theirs
    assert mx.array_equal(again.model.norm.running_mean, whole.model.norm.running_mean)


def test_another_base_is_refused_by_name(tmp_path):
    policy = CheckpointPolicy(frozen="expect")
    based().fit(data(), epochs=1, verbose=0, checkpoint_dir=tmp_path, checkpoint_every=policy)
    other = based()
    other.model.base.bias = other.model.base.bias + 1
    with pytest.raises(CheckpointMismatchError, match=r"differ.*: base\.bias\."):
        other.fit(data(), epochs=2, verbose=0, checkpoint_dir=tmp_path, resume=True)


class Centred(nn.Module):
    """Running statistics of a user's own, which nothing but their change tells from a base."""

    def __init__(self):
        super().__init__()
        self.running = mx.zeros((4,))
        self.freeze(keys=["running"], recurse=False)

    def __call__(self, x):
        self.running = 0.9 * self.running + 0.1 * x.mean(0)
        return x - self.running


def centred():
    mx.random.seed(3)
    model = nn.Sequential(Centred(), nn.Linear(4, 2))
    mx.eval(model.parameters())
    return trainer_of(model)


def test_what_is_frozen_and_changes_is_written(tmp_path):
    arguments = {"verbose": 0, "checkpoint_every": CheckpointPolicy(frozen="expect")}
    whole, resumed = centred(), centred()
    whole.fit(data(), epochs=3, verbose=0)
    centred().fit(data(), epochs=2, checkpoint_dir=tmp_path, **arguments)
    resumed.fit(data(), epochs=3, checkpoint_dir=tmp_path, resume=True, **arguments)
    assert mx.array_equal(resumed.model.layers[0].running, whole.model.layers[0].running)


def test_a_named_tuple_in_a_state_is_saved_as_a_tuple(tmp_path):
    Point = namedtuple("Point", "x y")
    assert decode(Encoder().encode(Point(1, 2), "p"), {}) == (1, 2)


def test_a_checkpoint_says_what_it_is(saved):
    document = document_of(saved)
    assert (document["format"], document["step"], document["epoch"]) == (1, 8, 1)
    assert document["trainable"] == [
        *("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")
    ]
    assert document["arguments"]["optimizer.learning_rate"] == pytest.approx(0.01)
    assert document["versions"]["mlx"] == mx.__version__
    assert set(files_of(saved)) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert Path(saved).name == "step-00000008"
