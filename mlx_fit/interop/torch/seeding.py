"""One seed for every generator of random numbers."""

from __future__ import annotations

import random
import sys

import mlx.core as mx
import numpy as np

from mlx_fit.checks import natural
from mlx_fit.errors import ConfigurationError


def seed_everything(seed: int) -> int:
    """Seed Python's ``random``, NumPy, MLX and, where it is loaded, PyTorch.

    Call it before the model is made, whose initial weights are drawn from MLX's key. A trainer's
    own ``seed`` fixes the order of data besides.

    Args:
        seed: from 0 to 2**32 - 1, NumPy's range.

    Returns:
        The seed.

    Raises:
        ConfigurationError: it is no such number.

    Example:
        >>> from mlx_fit.interop.torch import seed_everything
        >>> seed_everything(7)
        7
    """
    seed = natural("seed", seed)
    if seed >= 2**32:
        raise ConfigurationError(f"seed={seed}; expected one below 2**32.")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    mx.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    return seed
