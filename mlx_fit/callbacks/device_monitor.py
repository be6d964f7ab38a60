"""How much memory is held, how busy the processors are, and how long training waits for data."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import mlx.core as mx

from mlx_fit.callbacks.base import Callback
from mlx_fit.checks import number
from mlx_fit.runtime.memory import active_bytes, cache_bytes, peak_bytes
from mlx_fit.runtime.utilisation import gpu_command, gpu_percent

DEVICE_KEYS = (
    "memory_active_mib",
    "memory_cache_mib",
    "memory_peak_mib",
    "data_wait_ms",
    "cpu_percent",
    "gpu_percent",
)
MIB = 2**20


class DeviceMonitor(Callback):
    """Adds facts about the machine to each epoch's logs, for the loggers after it in the list.

    - ``memory_active_mib``, ``memory_cache_mib``, ``memory_peak_mib``: what MLX holds in arrays,
      keeps for its next allocations, and held at most since the process began.
    - ``data_wait_ms``: the mean time from the end of a batch to the beginning of the next, without
      evaluations and saves.
    - ``cpu_percent``: CPU time of this process in the epoch, of all that its cores have.
    - ``gpu_percent``: the mean of samples taken in the epoch, where MLX computes on a GPU and the
      system tells (``nvidia-smi``; ``ioreg`` on macOS). It is that of the whole GPU.

    Args:
        interval: seconds between samples of ``gpu_percent``.

    Example:
        >>> callbacks = [DeviceMonitor()]  # then a CSVLogger, TensorBoard, ...
    """

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = number("DeviceMonitor: interval", interval, 0.01)
        self._start = (0.0, 0.0)
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_begin(self, logs: Any) -> None:
        """Start to sample the GPU, if there is one to sample."""
        self._end()
        command = gpu_command()
        if command is not None and mx.default_device().type != mx.DeviceType.cpu:
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._sample, args=(command, self._stop), daemon=True
            )
            self._thread.start()

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Start the clocks."""
        self._samples.clear()
        self._start = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Add the facts to the logs."""
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        facts = {
            "memory_active_mib": active_bytes() / MIB,
            "memory_cache_mib": cache_bytes() / MIB,
            "memory_peak_mib": peak_bytes() / MIB,
            "data_wait_ms": self.trainer.pace.wait_ms,
            "cpu_percent": 100 * cpu / (max(wall, 1e-9) * _num_cores()),
        }
        samples = list(self._samples)
        if samples:
            facts["gpu_percent"] = sum(samples) / len(samples)
        logs.update(facts)

    def on_train_end(self, logs: Any) -> None:
        """End the sampling."""
        self._end()

    def on_exception(self, error: BaseException) -> None:
        """End the sampling."""
        self._end()

    def _sample(self, command: tuple[str, ...], stop: threading.Event) -> None:
        """What the sampling thread does."""
        while not stop.wait(self._interval):
            percent = gpu_percent(command)
            if percent is None:
                return
            self._samples.append(percent)

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it, macOS does not
    return len(affinity(0)) if affinity else os.cpu_count() or 1
