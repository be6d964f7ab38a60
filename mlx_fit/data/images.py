"""Folders of images, one folder a class."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fit.checks import natural, path_of
from mlx_fit.errors import ConfigurationError, DataError

__all__ = ["ImageFolder"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_CHANNELS = ("L", "RGB", "RGBA")


class ImageFolder:
    """Images in ``root/<class>/...``, as PyTorch's class of this name has them.

    A row is ``(image, label)``: the pixels, uint8 of shape ``(height, width, channels)`` as MLX's
    convolutions want them, and the number of the class, int64. Images are read when they are
    asked for, turned as their EXIF orientation says. Scale and augment them with :class:`Map`.
    Needs Pillow: ``pip install mlx-fit[images]``.

    Args:
        root: the folder. Its folders are the classes, sorted by name; hidden ones do not count.
        size: ``(height, width)`` that images are resized to (bilinear), without which the images
            of a batch must be of one size.
        mode: channels: ``"RGB"``, ``"L"`` (grey, one channel) or ``"RGBA"``.
        suffixes: what files count as images, any case.

    Attributes:
        classes: names of the folders. class_to_idx: their numbers.
        samples: (path, label) of each row.

    Raises:
        ConfigurationError: an argument that cannot work, or Pillow is missing.
        DataError: there is no class or no image. Reading a row raises it for a file that is no
            image, with ``path`` and ``index``.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> from mlx_fit.data import DataLoader, ImageFolder
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (root / name).mkdir()
        ...     Image.new("RGB", (20, 10)).save(root / name / "1.png")
        >>> images = ImageFolder(root, size=(8, 8))
        >>> x, y = next(iter(DataLoader(images, batch_size=2)))
        >>> images.classes, x.shape, y.tolist()
        (['cat', 'dog'], (2, 8, 8, 3), [0, 1])
    """

    def __init__(
        self,
        root: str | Path,
        size: tuple[int, int] | None = None,
        *,
        mode: str = "RGB",
        suffixes: Iterable[str] = _SUFFIXES,
    ) -> None:
        _pillow()
        self.root = path_of("root", root)
        self.size = None if size is None else _checked_size(size)
        if mode not in _CHANNELS:
            raise ConfigurationError(f"mode={mode!r}; expected one of {', '.join(_CHANNELS)}.")
        self.mode = mode
        self.classes = _classes(self.root)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        endings = tuple(suffix.lower() for suffix in suffixes)
        self.samples = [
            (path, label)
            for name, label in self.class_to_idx.items()
            for path in sorted((self.root / name).rglob("*"))
            if path.name.lower().endswith(endings) and path.is_file()
        ]
        if not self.samples:
            raise DataError(
                f"has no image in its {len(self.classes)} folders; files ending in "
                f"{', '.join(endings)} count.",
                path=self.root,
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Row ``index``: uint8 of shape ``(height, width, channels)``, and its label."""
        index = operator.index(index)
        path, label = self.samples[index]
        image_module, turned = _pillow()
        try:
            with image_module.open(path) as file:
                image = turned(file).convert(self.mode)
                if self.size is not None:
                    height, width = self.size
                    image = image.resize((width, height), image_module.Resampling.BILINEAR)
                pixels = np.array(image)
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise DataError(
                f"cannot be read as an image: {error}", path=path, index=index
            ) from error
        return pixels.reshape(*pixels.shape[:2], -1), label


def _pillow() -> Any:
    """Pillow's module of images and its function that turns them upright."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigurationError(
            "ImageFolder needs Pillow: pip install mlx-fit[images]."
        ) from error
    return Image, ImageOps.exif_transpose


def _checked_size(size: Any) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ConfigurationError(f"size={size!r}; expected (height, width) in pixels.")
    return natural("size[0]", size[0], 1), natural("size[1]", size[1], 1)


def _classes(root: Path) -> list[str]:
    try:
        names = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise DataError(f"cannot be read as a folder: {error}", path=root) from error
    if not names:
        raise DataError("has no folders; expected one for each class.", path=root)
    return names
