"""Memory while a fit runs: a bound on what MLX keeps, and a warning when it gets tight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import mlx.core as mx

from mlx_fit.runtime.memory import limit_bytes, peak_bytes
from mlx_fit.runtime.pressure import PressureWatch

LEAST_CACHE = 64 << 20
SHARE = 1.25  # of the peak: a step of one shape reuses less than its peak
SECONDS = 10.0  # between looks at the system


class MemoryWatch:
    """Bounds MLX's cache by what training needs, and warns once if the system runs short.

    MLX keeps every buffer that is freed for later, by default until memory is full, and batches of
    many shapes leave buffers of many sizes. A quarter more than the peak lets a step of one shape
    find all of its buffers again. A ``cache_limit`` of the user's own stays.
    """

    def __init__(self) -> None:
        self._limit = 0
        self._bounds_cache = False
        self._pressure: PressureWatch | None = None
        self._next_look = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside; the cache limit of before holds again outside."""
        self._limit = limit_bytes()
        before = mx.set_cache_limit(self._cache_limit())
        # MLX's own default is no smaller than all the memory that it may use.
        self._bounds_cache = before >= mx.get_memory_limit()
        if not self._bounds_cache:
            mx.set_cache_limit(before)
        self._pressure = PressureWatch()
        self._next_look = perf_counter() + SECONDS
        try:
            yield
        finally:
            mx.set_cache_limit(before)
            self._pressure = None

    def look(self) -> None:
        """Adapt the bound to the peak so far; from time to time, look at the system."""
        if self._bounds_cache:
            mx.set_cache_limit(self._cache_limit())
        if self._pressure is not None and perf_counter() >= self._next_look:
            self._next_look = perf_counter() + SECONDS
            if found := self._pressure.found():
                self._pressure = None  # once a run
                warnings.warn(
                    f"The system is short of memory: {found}. Training slows down a lot when "
                    "memory is written to disk: use a smaller batch_size with "
                    "gradient_accumulation, or mixed_bfloat16 precision. trainer.plan(batch) "
                    "shows what takes how much.",
                    stacklevel=2,
                )

    def _cache_limit(self) -> int:
        return max(LEAST_CACHE, min(int(SHARE * peak_bytes()), self._limit - peak_bytes()))
