"""Arrays as pictures: PNG files without a graphics library."""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError

_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> PNG's colour type


def as_pixels(image: Any, name: str) -> np.ndarray:
    """An image as uint8 pixels of shape ``(height, width, channels)``.

    Args:
        image: NumPy or MLX, of shape ``(height, width)``, ``(height, width, 1, 3 or 4)``, or with a
            leading axis of several images, which are put into a grid. Floats are in [0, 1], and
            what lies outside is clipped; integers in [0, 255].
        name: what it is called, for the message.

    Raises:
        ConfigurationError: the shape is another one.
    """
    if isinstance(image, mx.array) and image.dtype == mx.bfloat16:
        image = image.astype(mx.float32)
    pixels = np.array(image)
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] not in _COLOUR_TYPES):
        pixels = pixels[..., None]
    if pixels.ndim == 4:
        pixels = _grid(pixels)
    if pixels.ndim != 3 or pixels.shape[-1] not in _COLOUR_TYPES or not pixels.size:
        raise ConfigurationError(
            f"{name} has shape {np.shape(image)}; expected (height, width), (height, width, "
            "channels) or (images, height, width, channels) with 1, 3 or 4 channels."
        )
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0) * 255
    elif pixels.dtype.kind == "b":
        pixels = pixels * 255
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def heat_map(matrix: Any) -> np.ndarray:
    """A matrix as a picture, uint8 ``(height, width, 3)``: white is 0, dark blue its row's largest.

    Each row is scaled by itself, so that rare classes of a confusion matrix can be seen.
    """
    values = np.nan_to_num(np.asarray(matrix, np.float64))
    largest = np.abs(values).max(axis=1, keepdims=True)
    shares = np.abs(values) / np.where(largest == 0, 1.0, largest)
    colours = 255 - shares[..., None] * (255 - np.array([8.0, 48.0, 107.0]))
    cell = max(1, min(32, 512 // max(values.shape)))
    return np.rint(colours).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)


def png(pixels: np.ndarray) -> bytes:
    """uint8 pixels of shape ``(height, width, channels)`` as a PNG file (ISO/IEC 15948)."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with filter type 0
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows.tobytes()))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _grid(images: np.ndarray) -> np.ndarray:
    """Images ``(count, height, width, channels)`` in rows, as square as it goes."""
    count, height, width, channels = images.shape
    columns = max(1, math.isqrt(max(count - 1, 0)) + 1) if count else 1
    lines = -(-count // columns)
    grid = np.zeros((lines * height, columns * width, channels), images.dtype)
    for index, image in enumerate(images):
        y, x = divmod(index, columns)
        grid[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    return grid
