"""The errors of mlx_fit, and the one table that turns MLX's runtime texts into them.

Every error derives from :class:`MlxFitError` and from the built-in class a Python programmer would
expect (``ConfigurationError`` is a ``ValueError``). Each carries its facts as attributes, says what
to do, and keeps what caused it as ``__cause__``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWriteError",
    "CollectiveTimeoutError",
    "ConfigurationError",
    "DataError",
    "DeviceError",
    "DistributedError",
    "MlxFitError",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "ParameterDesyncError",
    "PeerError",
    "PeerLostError",
    "PlanMismatchError",
    "Preempted",
    "RendezvousError",
    "ResumeError",
    "UnknownMonitorError",
    "WorkerError",
    "from_runtime_error",
]


class MlxFitError(Exception):
    """Base of every error that mlx_fit raises. All of them can be pickled, with their facts."""

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, (type(self), self.args, dict(self.__dict__))


def rebuilt(kind: type[BaseException], args: tuple[Any, ...], facts: dict[str, Any]) -> Any:
    """An error as it was, past its own ``__init__``, whose arguments are not kept."""
    blank = type(kind.__name__, (kind,), {"__init__": lambda self, *args: None})
    error = blank(*args)
    error.__class__ = kind
    error.args = args
    error.__dict__.update(facts)
    return error


class ConfigurationError(MlxFitError, ValueError):
    """An argument has a value that cannot work; the message names it and what to change."""


class UnknownMonitorError(ConfigurationError):
    """A callback monitors a quantity that training does not produce.

    Attributes:
        monitor: the name that was asked for.
        available: the names that exist.
    """

    def __init__(self, monitor: str, available: Iterable[str], owner: str = "A callback") -> None:
        self.monitor = monitor
        self.available = sorted(available)
        super().__init__(
            f"{owner} monitors {monitor!r}, which has not appeared. Available: "
            f"{', '.join(self.available) or 'nothing yet'}. Change monitor=, or add the metric."
        )


class DataError(MlxFitError, ValueError):
    """Data that cannot be trained on.

    Attributes (None where they do not apply):
        path: file. line, column: position in it, 1-based. field: name of the field or array.
        index: row in the data set.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        line: int | None = None,
        column: int | None = None,
        field: str | None = None,
        index: int | None = None,
    ) -> None:
        self.path = None if path is None else str(path)
        self.line = line
        self.column = column
        self.field = field
        self.index = index
        where = ":".join(str(part) for part in (self.path, line, column) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)


class WorkerError(MlxFitError, RuntimeError):
    """A worker of a DataLoader died, or gave no batch in time.

    Attributes (None where they do not apply):
        worker: its number, 0-based; None for the thread. signal: what killed it. exit_code: what it
            ended with by itself. epoch, batch: what was waited for, 0-based. indices: rows that it
            had been given and not handed over.
    """

    def __init__(
        self,
        message: str,
        *,
        worker: int | None = None,
        signal: int | None = None,
        exit_code: int | None = None,
        epoch: int | None = None,
        batch: int | None = None,
        indices: Iterable[int] = (),
    ) -> None:
        self.worker = worker
        self.signal = signal
        self.exit_code = exit_code
        self.epoch = epoch
        self.batch = batch
        self.indices = [int(index) for index in indices]
        super().__init__(message)


class DeviceError(MlxFitError, RuntimeError):
    """The device is missing, or failed while computing."""


class OutOfMemoryError(MlxFitError, MemoryError):
    """The device has not enough memory for what was asked.

    Attributes (None where unknown):
        needed_bytes, limit_bytes: what the allocation wanted and what the device allows.
        batch_size: rows of the batch that did not fit.
        suggestion: what to change.
        kind: ``"foreseen"`` before anything was computed, ``"allocation"`` that failed,
            ``"execution"`` that failed on the device for want of memory, or ``"buffers"``: their
            number is limited, whatever their size.
    """

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int | None = None,
        limit_bytes: int | None = None,
        batch_size: int | None = None,
        suggestion: str | None = None,
        kind: str = "allocation",
    ) -> None:
        self.kind = kind
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes
        self.batch_size = batch_size
        self.suggestion = suggestion
        super().__init__(f"{message} {suggestion}" if suggestion else message)


class NonFiniteLossError(MlxFitError, ArithmeticError):
    """The loss became NaN or infinite.

    Attributes:
        step: the first bad step, 1-based over the run. epoch: its epoch, 0-based.
        value: the loss of that step where it is known, else NaN.
    """

    def __init__(self, message: str, *, step: int, epoch: int, value: float) -> None:
        self.step = step
        self.epoch = epoch
        self.value = value
        super().__init__(message)


def non_finite_loss(
    step: int, epoch: int, loss: float, scales_loss: bool = False
) -> NonFiniteLossError:
    """The error for a step (1-based) with a non-finite loss, or a loss scale that ran out."""
    where = f"at step {step} (epoch {epoch + 1})"
    if scales_loss:
        text = (
            f"The loss scale fell below 1 {where}: gradients overflow float16 at any scale. The "
            "weights are as before. Use precision='mixed_bfloat16', or smaller inputs."
        )
    else:
        text = (
            f"The loss was {loss} {where}. The weights have taken that update: go on from a "
            "checkpoint saved before it. A lower learning rate, clip_norm=1.0 or a check of the "
            "data usually helps; nonfinite='skip' leaves such batches out."
        )
    return NonFiniteLossError(text, step=step, epoch=epoch, value=loss)


class CheckpointError(MlxFitError, OSError):
    """A weights file or checkpoint could not be written or read. ``path`` names it."""

    def __init__(self, message: str, *, path: str | Path | None = None) -> None:
        self.path = None if path is None else str(path)
        super().__init__(message)


class CheckpointCorruptError(CheckpointError):
    """A file is damaged. ``expected`` and ``got`` say what differs."""

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        self.expected = expected
        self.got = got
        super().__init__(message, path=path)


class CheckpointMismatchError(CheckpointError):
    """Saved arrays do not fit the model.

    Attributes:
        missing: names the model has and the file has not. extra: the reverse.
        misshapen: name -> (shape in the file, shape in the model).
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        missing: Iterable[str] = (),
        extra: Iterable[str] = (),
        misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.missing = list(missing)
        self.extra = list(extra)
        self.misshapen = dict(misshapen or {})
        super().__init__(message, path=path)


class CheckpointWriteError(CheckpointError):
    """A save failed; what was saved before is still whole."""


class ResumeError(MlxFitError, RuntimeError):
    """A run cannot be continued from where it was asked to."""


class DistributedError(DeviceError):
    """Something between ranks failed.

    Attributes:
        exit_code: what a rank exits with if nobody catches it: 75 where starting all ranks again
            from the last checkpoint may help, else 1.
    """

    exit_code = 1


class PeerLostError(DistributedError):
    """A rank disappeared. Attributes: rank, step, cause."""

    exit_code = 75

    def __init__(self, message: str, *, rank: int, step: int, cause: str = "") -> None:
        self.rank = rank
        self.step = step
        self.cause = cause
        super().__init__(message)


class PeerError(DistributedError):
    """Another rank raised.

    Attributes:
        rank: which one. step: where it was. type: its exception's class name. message: what it
            said. exit_code: that rank's where it asks for a restart or was preempted, else 1.
    """

    def __init__(
        self, text: str, *, rank: int, step: int, type: str, message: str, exit_code: int = 1
    ) -> None:
        self.exit_code = exit_code
        self.rank = rank
        self.step = step
        self.type = type
        self.message = message
        super().__init__(text)


class CollectiveTimeoutError(DistributedError):
    """A collective did not end in time. Attributes (None where unknown): step, phase."""

    exit_code = 75

    def __init__(self, message: str, *, step: int | None = None, phase: str | None = None) -> None:
        self.step = step
        self.phase = phase
        super().__init__(message)


class RendezvousError(DistributedError):
    """Ranks did not arrive. ``missing`` lists them."""

    exit_code = 75

    def __init__(self, message: str, *, missing: Iterable[int] = ()) -> None:
        self.missing = list(missing)
        super().__init__(message)


class PlanMismatchError(DistributedError):
    """Ranks disagree about the model or the run.

    Attributes:
        first: the first entry that differs. ranks: two ranks that differ there.
        values: what each of them has, as text.
    """

    def __init__(
        self,
        message: str,
        *,
        first: str = "",
        ranks: Iterable[int] = (),
        values: Iterable[str] = (),
    ) -> None:
        self.first = first
        self.ranks = list(ranks)
        self.values = list(values)
        super().__init__(message)


class ParameterDesyncError(DistributedError):
    """Ranks that should have equal weights have not. Attributes: step, first (a parameter)."""

    def __init__(self, message: str, *, step: int, first: str) -> None:
        self.step = step
        self.first = first
        super().__init__(message)


class Preempted(MlxFitError, SystemExit):
    """SIGTERM ended the run after a whole step. Uncaught, the process exits with code 143."""

    # SystemExit exits with 1 for a text; 128 + SIGTERM is what schedulers expect.
    code = 143

    def __init__(self, message: str = "stopped by SIGTERM", *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step

    def __str__(self) -> str:
        return str(self.args[0])


# --- MLX's runtime texts -------------------------------------------------------------------------
# MLX raises plain RuntimeErrors, so only the text tells what happened. The patterns are anchored at
# the start: a user's own message that merely mentions memory must pass unchanged.

_FEWER_BYTES = (
    "Use a smaller batch_size with gradient_accumulation, or mixed_bfloat16 precision, "
    "or train fewer parameters."
)
_LESS_A_ROW = (
    "One row alone does not fit: use mixed_bfloat16 precision, finetune.checkpoint_layers, or "
    "train fewer parameters."
)
_FEWER_BUFFERS = (
    "This limit counts live buffers, not bytes: use fewer batch shapes (each compiled shape keeps "
    "its own), and do not hold on to old arrays."
)
_OUT_OF_MEMORY: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(
            r"\[metal::malloc\] Attempting to allocate (?P<needed>\d+) bytes which is greater than"
            r" the maximum allowed buffer size of (?P<limit>\d+) bytes"
        ),
        "allocation",
        _FEWER_BYTES,
    ),
    (
        re.compile(r"\[malloc(?:_or_wait)?\] Unable to allocate (?P<needed>\d+) bytes"),
        "allocation",
        _FEWER_BYTES,
    ),
    (
        re.compile(
            r"\[METAL\] Command buffer execution failed: Insufficient Memory"
            r" \([0-9a-f]+:kIOGPUCommandBufferCallbackErrorOutOfMemory\)"
        ),
        "execution",
        _FEWER_BYTES,
    ),
    (re.compile(r"cudaMalloc\w*(?:\(.*\))? failed: out of memory"), "allocation", _FEWER_BYTES),
    (re.compile(r"cuda\w+(?:\(.*\))? failed: out of memory"), "execution", _FEWER_BYTES),
    (
        re.compile(r"\[metal::malloc\] Resource limit \((?P<buffers>\d+)\) exceeded"),
        "buffers",
        _FEWER_BUFFERS,
    ),
)
_DEVICE_FAULT = re.compile(
    r"\[METAL\] Command buffer execution failed: "
    r"(?:Caused GPU Timeout Error|Impacting Interactivity|Internal Error"
    r"|Ignored \(for causing prior/excessive GPU errors\))"
    r"|cuda\w+(?:\(.*\))? failed: "
)


def from_runtime_error(
    error: BaseException, *, batch_size: int | None = None, state: str = ""
) -> OutOfMemoryError | DeviceError | None:
    """The typed error for one of MLX's runtime texts, or None if the text is not one of them.

    Args:
        error: what MLX raised. Only ``RuntimeError`` and ``MemoryError`` proper are looked at, so
            that subclasses (a user's own) pass unchanged.
        batch_size: rows of the batch that was being computed, kept on the result.
        state: a sentence on what became of weights and optimizer state.
    """
    if type(error) not in (RuntimeError, MemoryError):
        return None
    text = str(error)
    for pattern, kind, suggestion in _OUT_OF_MEMORY:
        if match := pattern.match(text):
            facts = match.groupdict()
            if batch_size == 1 and suggestion == _FEWER_BYTES:
                suggestion = _LESS_A_ROW
            return OutOfMemoryError(
                f"The device ran out of memory: {text.rstrip('.')}.{f' {state}' if state else ''}",
                needed_bytes=int(facts["needed"]) if facts.get("needed") else None,
                limit_bytes=int(facts["limit"]) if facts.get("limit") else None,
                batch_size=batch_size,
                suggestion=suggestion,
                kind=kind,
            )
    if _DEVICE_FAULT.match(text):
        state = state or (
            "Weights and optimizer state may be half updated: go on from a checkpoint."
        )
        return DeviceError(f"The device failed: {text.rstrip('.')}. {state}")
    return None
