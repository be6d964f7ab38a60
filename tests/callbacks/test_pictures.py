"""Pictures, read back by Pillow."""

import io

import mlx.core as mx
import numpy as np
import pytest

from mlx_fit import ConfigurationError
from mlx_fit.callbacks.pictures import as_pixels, heat_map, png

image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_holds_the_pixels(channels, rng):
    pixels = rng.integers(0, 256, (5, 7, channels)).astype(np.uint8)
    read = np.array(image.open(io.BytesIO(png(pixels))))
    assert np.array_equal(read.reshape(pixels.shape), pixels)


def test_floats_are_shares_of_white_and_bools_are_black_and_white():
    expected = np.array([[0, 0, 128, 255, 255, 0]], np.uint8)[..., None]
    values = np.array([[-1.0, 0.0, 0.5, 1.0, np.inf, np.nan]])
    assert np.array_equal(as_pixels(values, "x"), expected)
    assert as_pixels(np.array([[True, False]]), "x").ravel().tolist() == [255, 0]
    assert as_pixels(np.array([[3, 300, -1]]), "x").ravel().tolist() == [3, 255, 0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6), (4, 6, 1)),
        ((4, 6, 3), (4, 6, 3)),
        ((5, 4, 6), (8, 18, 1)),
        ((5, 4, 6, 3), (8, 18, 3)),
        ((1, 4, 6, 1), (4, 6, 1)),
    ],
)
def test_several_images_are_a_grid(shape, expected):
    assert as_pixels(mx.zeros(shape, mx.bfloat16), "x").shape == expected


def test_the_images_of_a_grid_stand_in_rows():
    images = np.arange(5, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    grid = as_pixels(images, "x")[::2, ::2, 0]
    assert grid.tolist() == [[0, 1, 2], [3, 4, 0]]


def test_a_heat_map_is_darker_where_more_is_and_scales_each_row():
    pixels = heat_map([[0, 10, 5], [1, 0, 0], [0, 0, 0]])
    assert pixels.shape == (96, 96, 3)
    cells = pixels[::32, ::32].sum(-1)
    assert cells[0, 0] > cells[0, 2] > cells[0, 1] == cells[1, 0]
    assert cells[2].tolist() == [765] * 3
    assert heat_map(np.eye(600)).shape == (600, 600, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5), (0, 3), (2, 2, 2, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ConfigurationError, match="The image 'x' has shape"):
        as_pixels(np.zeros(shape), "The image 'x'")
