"""What synchronising costs: bytes, seconds, and the share of a step, before anything is bought.

A ring all-reduce of ``B`` bytes over ``N`` ranks takes ``2 (N - 1)`` rounds, in each of which every
rank sends ``B / N`` bytes: ``2 (N - 1) / N B`` bytes in all, which no algorithm can do with less
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
J. Parallel Distrib. Comput. 69, 2009, section 3). Training computes about six operations for each
parameter and token (Kaplan et al., arXiv 2001.08361, section 2.1).

``python -m mlx_fit.distributed.cost`` prints the tables of docs/distributed.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_fit.checks import natural, number
from mlx_fit.errors import ConfigurationError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_POWERSGD = re.compile(r"powersgd:([1-9]\d*)")
OPERATIONS_PER_TOKEN = 6  # for each parameter: two forward, four backward


@dataclass(frozen=True)
class Sync:
    """One way of synchronising a model over some ranks.

    Attributes:
        num_parameters: trained ones.
        num_ranks: in a ring.
        gigabits: what the slowest link carries a second, in 1e9 bits.
        compute_seconds: of a step on one rank, synchronisation apart.
        scheme: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"`` (every rank's gradient
            reaches every other), or ``"powersgd:R"`` with rank R (arXiv 1905.13727).
        every: steps from one synchronisation to the next (accumulation, or local SGD's ``every``).
        latency: seconds that one message takes beside its bytes.
        overhead_seconds: of each synchronisation, for compressing and casting.
        width: side of the weight matrices, square ones, for PowerSGD.

    Example:
        >>> slow = Sync(10_000_000, num_ranks=2, gigabits=0.1, compute_seconds=0.144)
        >>> round(slow.sync_seconds, 2), round(slow.share, 2)
        (3.2, 0.96)
    """

    num_parameters: int
    num_ranks: int
    gigabits: float
    compute_seconds: float = 0.0
    scheme: str = "float32"
    every: int = 1
    latency: float = 50e-6
    overhead_seconds: float = 0.0
    width: int = 1024

    def __post_init__(self) -> None:
        for name in ("num_parameters", "num_ranks", "every", "width"):
            natural(name, getattr(self, name), least=1)
        for name in ("compute_seconds", "latency", "overhead_seconds"):
            number(name, getattr(self, name), least=0)
        if number("gigabits", self.gigabits, least=0) == 0:
            raise ConfigurationError("gigabits=0; expected what a link carries.")
        if self.scheme not in _BYTES and not _POWERSGD.fullmatch(self.scheme):
            raise ConfigurationError(
                f"scheme={self.scheme!r}; expected one of {sorted(_BYTES)}, or 'powersgd:4'."
            )

    @property
    def num_bytes(self) -> float:
        """Bytes that each rank sends for one synchronisation."""
        others = self.num_ranks - 1
        if self.scheme == "int8":  # gathered, not summed on the way: sums of int8 overflow
            return others * self.num_parameters * _BYTES["int8"]
        return 2 * others / self.num_ranks * self._payload

    @property
    def sync_seconds(self) -> float:
        """Seconds of one synchronisation."""
        if self.num_ranks == 1:
            return 0.0
        rounds = self.num_ranks - 1
        if self.scheme != "int8":
            rounds *= 2
        if self.scheme.startswith("powersgd"):
            rounds *= 2  # its two factors, one after the other
        wire = self.num_bytes * 8 / (self.gigabits * 1e9)
        return wire + rounds * self.latency + self.overhead_seconds

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, with its part of a synchronisation; nothing overlaps."""
        return self.compute_seconds + self.sync_seconds / self.every

    @property
    def share(self) -> float:
        """The part of a step that goes into synchronising."""
        step = self.step_seconds
        return 0.0 if step == 0 else self.sync_seconds / self.every / step

    @property
    def speedup(self) -> float:
        """How much more all ranks do in a second than one alone."""
        step = self.step_seconds
        return float(self.num_ranks) if step == 0 else self.num_ranks * self.compute_seconds / step

    @property
    def _payload(self) -> float:
        """Bytes that are summed."""
        if match := _POWERSGD.fullmatch(self.scheme):
            part = min(1.0, 2 * int(match[1]) / self.width)
            return self.num_parameters * part * _BYTES["float32"]
        return self.num_parameters * _BYTES[self.scheme]


def compute_seconds(num_parameters: int, num_tokens: int, teraflops: float) -> float:
    """Seconds of a step on one rank: ``6 * num_parameters * num_tokens`` operations.

    Args:
        num_parameters: of the model.
        num_tokens: that the rank trains on in this step.
        teraflops: 1e12 operations a second that it reaches in training, not its peak.
    """
    return OPERATIONS_PER_TOKEN * num_parameters * num_tokens / (teraflops * 1e12)


# --- the tables of the documentation --------------------------------------------------------------

MODELS = {"10 M": 10_000_000, "1 B": 1_000_000_000, "8 B": 8_000_000_000}
SPEEDS = (1, 10, 40, 100)
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
TERAFLOPS = 10.0
# 10 M parameters, 2 ranks, a link of 100 Mbit/s. The step's 0.144 s are fitted to two of these
# ratios (bfloat16, and with accumulation), the compressors' own time to theirs.
MEASURED_COMPUTE = 0.144
MEASURED: tuple[tuple[str, str, int, float, float], ...] = (
    ("bfloat16", "bfloat16", 1, 0.0, 1.9),
    ("int8", "int8", 1, 0.1, 3.2),
    ("bfloat16, accumulate 8", "bfloat16", 8, 0.0, 9.8),
    ("PowerSGD, rank 4", "powersgd:4", 1, 0.134, 11.0),
)


def measured_table() -> str:
    """Measured ratios beside the model's."""
    base = Sync(10_000_000, 2, 0.1, MEASURED_COMPUTE).step_seconds
    rows = []
    for name, scheme, every, overhead, ratio in MEASURED:
        sync = Sync(10_000_000, 2, 0.1, MEASURED_COMPUTE, scheme, every, overhead_seconds=overhead)
        rows.append([name, f"{ratio:.1f}x", f"{base / sync.step_seconds:.1f}x"])
    return _table(["scheme", "measured", "model"], rows)


def seconds_table(model: str, scheme: str = "float32") -> str:
    """Seconds of one synchronisation, by ranks and speed of the links."""

    def cell(ranks: int, speed: float) -> str:
        return _seconds(Sync(MODELS[model], ranks, speed, scheme=scheme).sync_seconds)

    def sent(ranks: int) -> str:
        return _bytes(Sync(MODELS[model], ranks, 1, scheme=scheme).num_bytes)

    return _by_ranks([f"{speed} Gbit/s" for speed in SPEEDS], SPEEDS, cell, sent)


def share_table(num_tokens: int, scheme: str = "float32", every: int = 1) -> str:
    """Share of the step for 1 B parameters, by ranks and speed of the links."""
    seconds = compute_seconds(MODELS["1 B"], num_tokens, TERAFLOPS)

    def cell(ranks: int, speed: float) -> str:
        return f"{Sync(MODELS['1 B'], ranks, speed, seconds, scheme, every).share:.1%}"

    return _by_ranks([f"{speed} Gbit/s" for speed in SPEEDS], SPEEDS, cell)


def _by_ranks(
    heads: Sequence[str],
    columns: Sequence[float],
    cell: Callable[[int, float], str],
    sent: Callable[[int], str] | None = None,
) -> str:
    rows = [
        [f"{ranks:,}", *([sent(ranks)] if sent else []), *(cell(ranks, c) for c in columns)]
        for ranks in RANKS
    ]
    return _table(["ranks", *(["each sends"] if sent else []), *heads], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def _seconds(value: float) -> str:
    if value == 0:
        return "0"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def _bytes(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.3g} GB"


def document() -> str:
    """All tables, as docs/distributed.md has them."""
    parts = ["measured against the model:", measured_table()]
    for model in MODELS:
        parts += [f"{model} parameters, float32:", seconds_table(model)]
    for tokens in (2048, 32_768):
        parts += [f"{tokens:,} tokens a rank and update, float32:", share_table(tokens)]
    parts += ["2,048 tokens, bfloat16, every 32 steps:", share_table(2048, "bfloat16", 32)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(document())
