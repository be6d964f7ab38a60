import builtins

import numpy as np
import pytest
from PIL import Image

from mlx_fit.data import DataLoader, ImageFolder
from mlx_fit.errors import ConfigurationError, DataError


@pytest.fixture
def root(tmp_path, rng):
    for name, files in {"b": ["2.PNG", "deep/1.png"], "a": ["x.png"], ".hidden": ["y.png"]}.items():
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, "PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "loose.png").write_bytes(b"")
    return tmp_path


def test_rows_are_pixels_and_the_number_of_the_folder(root):
    images = ImageFolder(root)
    assert (images.classes, images.class_to_idx) == (["a", "b"], {"a": 0, "b": 1})
    assert [path.name for path, _ in images.samples] == ["x.png", "2.PNG", "1.png"]
    for index, (path, label) in enumerate(images.samples):
        pixels, found = images[index]
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))
        assert found == label


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_batches_have_the_size_and_channels_asked_for(root, mode, channels):
    loader = DataLoader(ImageFolder(root, (3, 5), mode=mode), batch_size=3)
    x, y = next(iter(loader))
    assert (x.shape, x.dtype, y.tolist()) == ((3, 3, 5, channels), np.uint8, [0, 1, 1])


def test_images_are_turned_as_exif_says(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to view
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png", exif=exif)
    np.testing.assert_array_equal(ImageFolder(tmp_path)[0][0], np.rot90(pixels, -1))


def test_a_file_that_is_no_image_is_named(root):
    bad = root / "a" / "bad.png"
    bad.write_bytes((root / "a" / "x.png").read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        list(DataLoader(ImageFolder(root), batch_size=4))
    assert (caught.value.path, caught.value.index) == (str(bad), 0)
    assert "sample 0" in caught.value.__notes__[0]


def test_a_folder_without_classes_or_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no folders"):
        ImageFolder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no image in its 1 folders"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="cannot be read as a folder"):
        ImageFolder(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size=8"),
        ({"size": (8, 0)}, r"size\[1\]=0"),
        ({"mode": "CMYK"}, "mode='CMYK'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(root, options, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageFolder(root, **options)


def test_a_missing_pillow_is_named_with_the_extra(root, monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(ConfigurationError, match=r"mlx-fit\[images\]"):
        ImageFolder(root)
