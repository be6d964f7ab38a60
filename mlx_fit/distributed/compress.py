"""Gradients in fewer bytes than their sum needs; what is lost in one update is made up in the next.

Each rank adds what it could not send to its next gradient (error feedback), so over many updates
the sum of what was applied is that of the gradients.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from typing import Any
from zlib import crc32

import mlx.core as mx
import numpy as np

from mlx_fit.communicator import gather
from mlx_fit.distributed.ring import Ring
from mlx_fit.errors import ConfigurationError

Named = dict[str, mx.array]
BLOCK = 1024  # elements that share a scale
_POWER = re.compile(r"powersgd:([1-9]\d*)")


class Compressor(ABC):
    """Sums float32 arrays over the ranks, nearly."""

    def __init__(self) -> None:
        self._residuals: Named = {}  # what this rank could not send yet

    def sum(self, ring: Ring, arrays: Named) -> Named:
        """The sums of arrays over the ranks, the same on all of them."""
        wanted = {
            name: value + self._residuals[name] if name in self._residuals else value
            for name, value in arrays.items()
        }
        found, sent = self._exchange(ring, wanted)
        self._residuals = {name: wanted[name] - part for name, part in sent.items()}
        mx.eval(found, self._residuals)
        return found

    @abstractmethod
    def _exchange(self, ring: Ring, arrays: Named) -> tuple[Named, Named]:
        """Approximate sums, and this rank's part of them for the arrays that it approximates."""

    @abstractmethod
    def _extra(self) -> Named:
        """What else it remembers, the same on all ranks."""

    @abstractmethod
    def _take_extra(self, arrays: Named) -> None:
        """Take back what :meth:`_extra` gave."""

    def state_dict(self, ring: Ring) -> dict[str, Any]:
        """The residuals of all ranks, and what they share. Collective."""
        return {"residuals": gather(ring, dict(self._residuals)), "shared": dict(self._extra())}

    def load_state_dict(self, state: dict[str, Any], ring: Ring) -> None:
        """Go on with this rank's residual; without one if there were other ranks."""
        self._take_extra({name: mx.array(value) for name, value in state["shared"].items()})
        saved = state["residuals"]
        if len(saved) == ring.size:
            own = saved[ring.rank]
            self._residuals = {name: mx.array(value) for name, value in own.items()}
            return
        self._residuals = {}
        warnings.warn(
            f"The checkpoint was made by {len(saved)} ranks, and there are {ring.size} now: what "
            "compression had yet to send of their gradients is left out.",
            stacklevel=2,
        )


class Int8(Compressor):
    """One byte an element, with a scale for every 1,024: all ranks get all parts, and sum them in
    float32."""

    def _exchange(self, ring: Ring, arrays: Named) -> tuple[Named, Named]:
        flat = mx.concatenate([value.reshape(-1) for value in arrays.values()])
        codes, scales = quantized(flat)
        message = mx.concatenate([codes.view(mx.uint8), scales.view(mx.uint8)])
        messages = ring.gather_arrays(message.reshape(1, -1), "gradients")
        total = mx.zeros(flat.shape, mx.float32)
        for other in messages:  # in the order of ranks: the same bits everywhere
            total = total + _dequantized(other[: flat.size], other[flat.size :])
        own = messages[ring.rank]
        sent = _dequantized(own[: flat.size], own[flat.size :])
        return _split(total, arrays), _split(sent, arrays)

    def _extra(self) -> Named:
        return {}

    def _take_extra(self, arrays: Named) -> None:
        pass


def quantized(flat: mx.array) -> tuple[mx.array, mx.array]:
    """int8 codes of shape ``(n,)``, and float32 scales of shape ``(ceil(n / 1024),)``.

    A scale is the block's largest size over 127, so no element is off by more than half of it.
    """
    blocks = mx.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    scales = mx.abs(blocks).max(1) / 127
    codes = mx.round(blocks / mx.where(scales > 0, scales, 1.0)[:, None])
    return codes.astype(mx.int8).reshape(-1)[: flat.size], scales


def _dequantized(codes: mx.array, scales: mx.array) -> mx.array:
    """The numbers of what was sent, given as bytes."""
    values = codes.view(mx.int8).astype(mx.float32)
    blocks = mx.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    # A slice may begin anywhere, and a view needs its start aligned.
    factors = mx.contiguous(scales).view(mx.float32)
    return (blocks * factors[:, None]).reshape(-1)[: values.size]


def _split(flat: mx.array, arrays: Named) -> Named:
    found: Named = {}
    start = 0
    for name, value in arrays.items():
        found[name] = flat[start : start + value.size].reshape(value.shape)
        start += value.size
    return found


class PowerSGD(Compressor):
    """Matrices as a product of two thin ones (Vogels et al., "PowerSGD", arXiv 1905.13727,
    algorithm 1, with its warm start). Vectors, and matrices too small to gain, are sent whole.

    Args:
        rank: columns of the thin matrices.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._num_columns = rank
        self._right: Named = {}  # the second factors of the update before

    def _exchange(self, ring: Ring, arrays: Named) -> tuple[Named, Named]:
        matrices = {n: v.reshape(v.shape[0], -1) for n, v in arrays.items() if self._gains(v)}
        rest = {name: value for name, value in arrays.items() if name not in matrices}
        right = {name: self._factor(name, value.shape[1]) for name, value in matrices.items()}
        lefts = {f"left {name}": value @ right[name] for name, value in matrices.items()}
        summed = _summed(ring, lefts | rest)
        left = {n: mx.linalg.qr(summed[f"left {n}"], stream=mx.cpu)[0] for n in matrices}
        own = {name: value.T @ left[name] for name, value in matrices.items()}
        self._right = _summed(ring, own)
        found, sent = {name: summed[name] for name in rest}, {}
        for name in matrices:
            shape = arrays[name].shape
            found[name] = (left[name] @ self._right[name].T).reshape(shape)
            sent[name] = (left[name] @ own[name].T).reshape(shape)
        return {name: found[name] for name in arrays}, sent

    def _gains(self, value: mx.array) -> bool:
        if value.ndim < 2:
            return False
        height, width = value.shape[0], value.size // value.shape[0]
        return self._num_columns * (height + width) < value.size

    def _factor(self, name: str, width: int) -> mx.array:
        """The second factor to start with: that of the update before, or random numbers."""
        known = self._right.get(name)
        if known is not None and known.shape[0] == width:
            return known
        generator = np.random.default_rng(crc32(name.encode()))
        return mx.array(generator.normal(size=(width, self._num_columns)).astype(np.float32))

    def _extra(self) -> Named:
        return self._right

    def _take_extra(self, arrays: Named) -> None:
        self._right = arrays


def _summed(ring: Ring, arrays: Named) -> Named:
    if not arrays:
        return {}
    flat = mx.concatenate([value.reshape(-1) for value in arrays.values()])
    return _split(ring.sum([flat], "gradients")[0], arrays)


def compressor_of(name: str | None) -> Compressor | None:
    """The compressor that a :class:`SyncPolicy` names.

    Raises:
        ConfigurationError: there is no such one.
    """
    if name is None:
        return None
    if name == "int8":
        return Int8()
    if isinstance(name, str) and (match := _POWER.fullmatch(name)):
        return PowerSGD(int(match[1]))
    raise ConfigurationError(
        f"SyncPolicy(compress={name!r}); expected None, 'int8' or 'powersgd:<rank>', such as "
        "'powersgd:4'."
    )
