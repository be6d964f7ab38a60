"""Where a run computes, and how much memory it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_fit.errors import ConfigurationError, DeviceError
from mlx_fit.runtime.memory import parse_bytes

_TYPES = {"cpu": mx.cpu, "gpu": mx.gpu}


@dataclass(frozen=True)
class DeviceConfig:
    """The device of a run and its memory limits; None leaves MLX's default.

    Sizes are bytes, or texts such as ``"8GB"`` and ``"512MiB"``.

    Args:
        device: ``"cpu"`` or ``"gpu"``.
        memory_limit: memory MLX may use before it frees its cache and waits for running work
            (``mx.set_memory_limit``). On CPU it is a guideline that raises nothing.
        cache_limit: freed memory that MLX keeps for later (``mx.set_cache_limit``); 0 keeps none.
        wired_limit: memory that stays resident (``mx.set_wired_limit``); Metal only.

    Raises:
        ConfigurationError: a value that is none of these, or ``wired_limit`` without Metal.
        DeviceError: the device is not there.

    >>> with DeviceConfig(device="cpu", cache_limit="64MiB").applied():
    ...     print(mx.default_device())
    Device(cpu, 0)
    """

    device: str | None = None
    memory_limit: int | str | None = None
    cache_limit: int | str | None = None
    wired_limit: int | str | None = None

    def __post_init__(self) -> None:
        if self.device is not None and self.device not in _TYPES:
            raise ConfigurationError(
                f"device={self.device!r} is not a device: use 'cpu', 'gpu', or None for MLX's "
                "default."
            )
        if self.device is not None and not mx.is_available(_TYPES[self.device]):
            from importlib.metadata import version  # slow to import, and only for a message

            raise DeviceError(
                f"device={self.device!r} is not there: this MLX {version('mlx')} has "
                f"{', '.join(available())}. Use device=None for its default, or install MLX with "
                "the backend of your GPU."
            )
        for argument in ("memory_limit", "cache_limit", "wired_limit"):
            size = getattr(self, argument)
            if size is not None:
                parse_bytes(size, argument)
        if self.memory_limit is not None and parse_bytes(self.memory_limit, "memory_limit") == 0:
            raise ConfigurationError(
                f"memory_limit={self.memory_limit!r} leaves no memory: give more, or None."
            )
        if self.wired_limit is not None and not mx.metal.is_available():
            raise ConfigurationError(
                f"wired_limit={self.wired_limit!r} has no effect without Metal: use None here."
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with this configuration, and put the previous one back at the end."""
        limits: tuple[tuple[str, int | str | None, Callable[[int], int]], ...] = (
            ("memory_limit", self.memory_limit, mx.set_memory_limit),
            ("cache_limit", self.cache_limit, mx.set_cache_limit),
            ("wired_limit", self.wired_limit, mx.set_wired_limit),
        )
        with ExitStack() as previous:
            if self.device is not None:
                previous.callback(mx.set_default_device, mx.default_device())
                mx.set_default_device(mx.Device(_TYPES[self.device]))
            for argument, size, set_limit in limits:
                if size is not None:
                    previous.callback(set_limit, set_limit(parse_bytes(size, argument)))
            yield


def available() -> list[str]:
    """The devices of this MLX, by name, such as ``["cpu (AMD EPYC)", "gpu (Apple M3 Max)"]``."""
    found = []
    for name, kind in _TYPES.items():
        for index in range(mx.device_count(kind) if mx.is_available(kind) else 0):
            facts = mx.device_info(mx.Device(kind, index))
            found.append(f"{name} ({facts.get('device_name', 'unnamed')})")
    return found
