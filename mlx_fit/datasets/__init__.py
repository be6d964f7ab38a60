"""Small real data that comes with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 UCI handwritten digits (E. Alpaydin and C. Kaynak, CC BY 4.0).

    Returns:
        images, float32 of shape ``(1797, 8, 8)`` in [0, 1], and labels, int32 of shape ``(1797,)``.

    Example:
        >>> images, labels = digits()
        >>> images.shape, int(labels.max())
        ((1797, 8, 8), 9)
    """
    with np.load(Path(__file__).with_name("digits.npz")) as data:
        return data["images"].astype(np.float32) / 16, data["labels"].astype(np.int32)
