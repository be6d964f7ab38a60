"""How ranks exchange gradients, and how long they wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_fit.checks import natural, number
from mlx_fit.distributed.compress import compressor_of
from mlx_fit.errors import ConfigurationError

REDUCE_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class SyncPolicy:
    """How ranks exchange gradients, and how long they wait for each other.

    Args:
        reduce_dtype: None sums gradients in float32. ``"bfloat16"`` or ``"float16"`` sends half
            the bytes; weights of batches, losses and metrics are summed in float32 all the same.
        compress: None, ``"int8"`` (a quarter of the bytes) or ``"powersgd:4"`` (a matrix as the
            product of two with 4 columns). What one update cannot send goes with the next.
        bucket_mb: gradients are joined to messages of about so many MiB. 0 sends each by itself.
        timeout: seconds without a sign of life after which a rank counts as lost; at least 1. One
            that lives, but does not come to a collective, is waited for ten times as long.
        init_timeout: seconds that ranks wait for each other to start.
        check_every: compare the weights of all ranks every so many updates; 0: never.

    Raises:
        ConfigurationError: a value is none of these.

    Example:
        >>> SyncPolicy(reduce_dtype="bfloat16").bucket_mb
        32
    """

    reduce_dtype: str | None = None
    compress: str | None = None
    bucket_mb: float = 32
    timeout: float = 60
    init_timeout: float = 60
    check_every: int = 0

    def __post_init__(self) -> None:
        if self.reduce_dtype is not None and self.reduce_dtype not in REDUCE_DTYPES:
            raise ConfigurationError(
                f"SyncPolicy(reduce_dtype={self.reduce_dtype!r}); expected None, "
                f"{' or '.join(map(repr, REDUCE_DTYPES))}."
            )
        compressor_of(self.compress)
        if self.compress is not None and self.reduce_dtype is not None:
            raise ConfigurationError(
                "SyncPolicy: compress and reduce_dtype both say in what gradients are sent; give "
                "one of them."
            )
        number("SyncPolicy: bucket_mb", self.bucket_mb, 0.0)
        number("SyncPolicy: timeout", self.timeout, 1.0)
        number("SyncPolicy: init_timeout", self.init_timeout, 0.1)
        natural("SyncPolicy: check_every", self.check_every)

    @property
    def timeouts(self) -> tuple[float, float]:
        """``timeout`` and ``init_timeout``."""
        return self.timeout, self.init_timeout
