"""The order of samples: a pure function of (seed, epoch, n)."""

from __future__ import annotations

import math
import operator
from typing import overload

import numpy as np

from mlx_fit.errors import ConfigurationError

__all__ = ["ORDER_VERSION", "FeistelOrder", "order", "uniform"]

#: Changes whenever the same (seed, epoch, n) gives another order: saved positions are void then.
ORDER_VERSION = 1

# Above this a permutation (8 bytes per sample) costs more memory than computing its entries.
_LARGEST_PERMUTATION = 10_000_000
_TOO_MANY = 1 << 62  # entries and lengths are int64
_ROUNDS = 8
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def order(seed: int, epoch: int, n: int) -> np.ndarray | FeistelOrder:
    """The order in which an epoch visits ``n`` samples.

    It depends on the arguments alone: not on NumPy's global state, the process, or the number of
    ranks and workers. Seeds and epochs are hashed together, so that seed 0 in epoch 1 is unrelated
    to seed 1 in epoch 0.

    Args:
        seed: any integer.
        epoch: any integer, usually counted from 0.
        n: number of samples.

    Returns:
        A permutation of ``0 .. n - 1``: an int64 array of shape ``(n,)`` up to ten million samples,
        a :class:`FeistelOrder` of the same length beyond, which needs no memory.

    Raises:
        ConfigurationError: ``n`` is negative, or 2**62 and more.

    Example:
        >>> from mlx_fit.data import order
        >>> sorted(order(seed=0, epoch=1, n=5).tolist())
        [0, 1, 2, 3, 4]
    """
    seed, epoch, n = operator.index(seed), operator.index(epoch), operator.index(n)
    if n < 0:
        raise ConfigurationError(f"order() was asked for n={n} samples; n must be 0 or more.")
    if n >= _TOO_MANY:
        raise ConfigurationError(f"order() was asked for n={n} samples; n must be below 2**62.")
    digest = _digest(f"{ORDER_VERSION}:{seed}:{epoch}")
    if n > _LARGEST_PERMUTATION:
        return FeistelOrder(n, np.frombuffer(digest, "<u8").astype(np.uint64))
    return _permutation(n, int.from_bytes(digest[:16], "little"))


def uniform(seed: int, epoch: int, n: int) -> np.ndarray:
    """Random float64 numbers in [0, 1), of shape ``(n,)``: a pure function of the arguments.

    They are independent of :func:`order` with the same arguments.
    """
    digest = _digest(f"{ORDER_VERSION}:{operator.index(seed)}:{operator.index(epoch)}:uniform")
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return (words >> np.uint64(11)) * 2.0**-53


def _digest(text: str) -> bytes:
    from hashlib import blake2b  # slow to import: it loads OpenSSL

    return blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()


def _permutation(n: int, key: int) -> np.ndarray:
    # Sorting random words that carry their index in the low bits. NumPy promises Philox's raw
    # words for all versions, but not what Generator.permutation makes of them.
    words = np.random.Philox(key=key).random_raw(n)
    index_bits = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    words &= ~index_bits
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= index_bits
    return words.view(np.int64)


class FeistelOrder:
    """A permutation of ``0 .. n - 1`` whose entries are computed when asked for.

    A keyed Feistel network permutes the cells of the smallest square that holds ``n``; an entry
    that leaves ``0 .. n - 1`` is permuted again until it is back (cycle walking; Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002, sections 4 and 5).

    Args:
        n: length of the permutation, below ``2**62``.
        keys: one uint64 per round.
    """

    def __init__(self, n: int, keys: np.ndarray) -> None:
        self._n = n
        self._keys = keys
        self._side = np.uint64(math.isqrt(max(n - 1, 0)) + 1)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> np.ndarray: ...

    def __getitem__(self, index: int | slice) -> int | np.ndarray:
        """The entry at ``index``, or an int64 array for a slice."""
        if isinstance(index, slice):
            return self._permute(np.arange(*index.indices(self._n), dtype=np.uint64))
        position = range(self._n)[index]  # counts negative indices, raises IndexError
        return int(self._permute(np.array([position], dtype=np.uint64))[0])

    def _permute(self, values: np.ndarray) -> np.ndarray:
        values = self._encrypt(values)
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self._n]
        return values.view(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        side, half = self._side, np.uint64(32)
        left, right = np.divmod(values, side)
        for key in self._keys:
            mixed = (right + key) * _MIX_1
            mixed ^= mixed >> np.uint64(29)
            mixed *= _MIX_2
            # The upper 32 bits, scaled to 0 .. side - 1 without a slow modulo.
            mixed >>= half
            mixed = left + ((mixed * side) >> half)
            left, right = right, np.where(mixed >= side, mixed - side, mixed)
        return left * side + right
