"""PyTorch tensors as MLX arrays and back, bit for bit."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.errors import ConfigurationError, DataError


def require_torch(why: str) -> Any:
    """The module ``torch``.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigurationError(f"{why} needs PyTorch: pip install torch.") from error
    return torch


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor. Does not import torch: who has one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_array(value: Any, name: str = "The value") -> mx.array:
    """A tensor (of any device, with or without gradient), or a NumPy array, as an MLX array.

    bfloat16 keeps its bits; float64 becomes float32, which MLX's devices have in common.

    Raises:
        DataError: it is something else, or sparse, quantized or on the meta device.
    """
    if isinstance(value, mx.array):
        return value
    if not is_tensor(value):
        if not isinstance(value, (np.ndarray, np.generic)):
            raise DataError(f"{name} is a {type(value).__name__}; expected a tensor or an array.")
        return _from_numpy(np.asarray(value))
    torch = sys.modules["torch"]
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        raise DataError(
            f"{name} has no shape yet: it is of a lazy layer. Call the torch model once first."
        )
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise DataError(
            f"{name} is a tensor of layout {tensor.layout}, dtype {tensor.dtype} on "
            f"{tensor.device}; expected a plain dense one: tensor.to_dense() or .dequantize()."
        )
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    try:
        return _from_numpy(tensor.numpy())
    except TypeError as error:
        raise DataError(f"{name} has dtype {tensor.dtype}, which MLX does not have.") from error


def _from_numpy(array: np.ndarray) -> mx.array:
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return mx.array(np.ascontiguousarray(array).reshape(array.shape))


def to_tensor(array: mx.array) -> Any:
    """An MLX array as a torch tensor of its own memory, on the CPU."""
    torch = require_torch("Making tensors")
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        bits = np.array(array.view(mx.uint16))
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
