import io
import pickle

import numpy as np
import pytest

from mlx_fit.data import ArrayDataset, DataLoader, Subset, open_arrays
from mlx_fit.data.sources import split_rows
from mlx_fit.errors import DataError


@pytest.fixture
def arrays(rng):
    return {"x": rng.normal(size=(20, 3)), "y": np.arange(20), "f": np.asfortranarray(np.eye(20))}


def test_an_npy_file_is_mapped(tmp_path, arrays):
    np.save(tmp_path / "x.npy", arrays["x"])
    mapped = open_arrays(tmp_path / "x.npy")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, arrays["x"])
    batch = next(iter(DataLoader(mapped, 4)))
    np.testing.assert_array_equal(batch, arrays["x"][:4].astype(np.float32))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_gives_its_arrays_by_name(tmp_path, arrays, save):
    save(tmp_path / "data.npz", **arrays)
    opened = open_arrays(tmp_path / "data.npz")
    assert opened.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened[name], array)
        assert isinstance(opened[name], np.memmap) == (save is np.savez)
    assert len(ArrayDataset(opened)) == 20


def test_strings_and_empty_arrays_are_opened(tmp_path):
    np.savez(tmp_path / "a.npz", names=np.array(["é", "bc"]), none=np.zeros((2, 0)))
    opened = open_arrays(str(tmp_path / "a.npz"))
    assert opened["names"].tolist() == ["é", "bc"]
    assert opened["none"].shape == (2, 0)


def bytes_of(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4 not a zip",
        b"1,2,3\n",
        bytes_of(np.zeros(100))[:-8],
        bytes_of(np.array([{}]), allow_pickle=True),
        b"\x93NUMPY\x01\x00v\x00{'descr': 'x'",
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a NumPy file") as caught:
        open_arrays(path)
    assert caught.value.path == str(path)


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_opened_or_refused_with_their_name(tmp_path, save):
    random, path = np.random.default_rng(0), tmp_path / "a.npz"
    save(path, x=np.arange(20.0), y=np.zeros((2, 2)))
    whole, num_refused = path.read_bytes(), 0
    for _ in range(600):
        content = bytearray(whole)
        start = random.integers(len(content))
        content[start : start + random.integers(3)] = random.bytes(random.integers(3))
        path.write_bytes(content)
        try:
            open_arrays(path)
        except DataError as error:
            num_refused += error.path == str(path)
    assert num_refused > 300


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.npy"):
        open_arrays(tmp_path / "none.npy")


@pytest.mark.parametrize("change", [lambda d: d, lambda d: split_rows(d, 0.25)[1]])
def test_a_mapped_dataset_is_pickled_as_a_place_in_its_file(tmp_path, change):
    big = np.arange(400_000.0).reshape(1000, 400)
    np.savez(tmp_path / "big.npz", pad=np.zeros(3), x=big)
    dataset = change(ArrayDataset((open_arrays(tmp_path / "big.npz")["x"], np.arange(1000))))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    for ours, theirs in zip(pickle.loads(pickled)[7], dataset[7], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [lambda m: m[3:], lambda m: m[::2], lambda m: m.T, lambda m: np.array(m), lambda m: m[:0]],
)
def test_what_is_pickled_is_what_was_there(tmp_path, change):
    mapped = np.memmap(tmp_path / "raw", np.int32, "w+", shape=(8, 8))
    mapped[:] = np.arange(64).reshape(8, 8)
    dataset = ArrayDataset(change(mapped))
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again) == len(dataset)
    for index in range(len(dataset)):
        np.testing.assert_array_equal(again[index], dataset[index])


def test_changes_that_are_not_in_the_file_are_pickled(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(4))
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    private[2] = 5
    assert pickle.loads(pickle.dumps(ArrayDataset(private)))[2] == 5


def test_worker_processes_map_the_file_themselves(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10))
    data = Subset(open_arrays(tmp_path / "x.npy"), [3, 1, 4])
    loader = DataLoader(data, 2, num_workers=1)
    assert [batch.tolist() for batch in loader] == [[3, 1], [4]]
