"""How a batch becomes an update: the trainer's options, checked."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from mlx_fit.checks import boolean, natural
from mlx_fit.errors import ConfigurationError
from mlx_fit.precision import POLICIES, Precision


@dataclass(frozen=True)
class StepOptions:
    """How a batch becomes an update.

    Attributes:
        gradient_accumulation: batches to an update.
        clip_norm, clip_value: clipping of the averaged gradient; None: none.
        precision: the policy of :mod:`mlx_fit.precision`.
        compile: False runs the same functions eagerly.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"``.
        on_oom: ``"raise"`` or ``"split"``.
    """

    gradient_accumulation: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    precision: Precision = POLICIES["float32"]
    compile: bool = True
    nonfinite: str = "raise"
    on_oom: str = "raise"

    def __post_init__(self) -> None:
        natural("gradient_accumulation", self.gradient_accumulation, 1)
        boolean("compile", self.compile)
        for name in ("clip_norm", "clip_value"):
            limit = getattr(self, name)
            is_number = isinstance(limit, Real) and not isinstance(limit, bool)
            if limit is not None and not (is_number and float(limit) > 0):
                raise ConfigurationError(f"{name}={limit!r}; expected a positive number or None.")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ConfigurationError("Give clip_norm= or clip_value=, not both.")
        if self.nonfinite not in ("raise", "skip", "ignore"):
            raise ConfigurationError(
                f"nonfinite={self.nonfinite!r}; expected 'raise', 'skip' or 'ignore'."
            )
        if self.on_oom not in ("raise", "split"):
            raise ConfigurationError(f"on_oom={self.on_oom!r}; expected 'raise' or 'split'.")

    @property
    def masks_bad_batches(self) -> bool:
        """Whether a batch with non-finite loss or gradients is undone inside the step."""
        return self.nonfinite == "skip" or self.precision.scales_loss
