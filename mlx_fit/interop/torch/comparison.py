"""What a comparison of two models found, as tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_fit.interop.torch.report import table


@dataclass(frozen=True)
class Row:
    """One layer, gradient or buffer that both models have.

    Attributes:
        name: in the MLX model. torch_name: in the PyTorch model. kind: type of the MLX layer.
        difference: the largest absolute difference; infinity where the shapes differ.
        scale: PyTorch's largest absolute value.
        agrees: whether the difference is within the tolerance.
        reasons: why it may differ, the likeliest first; empty where it agrees.
    """

    name: str
    torch_name: str
    kind: str
    difference: float
    scale: float
    agrees: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``print(comparison)`` shows it as tables.

    Attributes:
        layers: the outputs of the layers, in the order in which MLX finished them; the last is
            the model's own.
        gradients: the gradients of the parameters.
        buffers: running statistics after the call in training mode.
        weights: names of arrays that differed before the call.
        unpaired: MLX layers and arrays without counterpart in the PyTorch model.
        notes: what else was seen: optimizer settings, reductions, gradients that were left out.
    """

    layers: list[Row]
    gradients: list[Row] = field(default_factory=list)
    buffers: list[Row] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether every output, gradient and buffer agrees, and there is nothing to note."""
        rows = [*self.layers, *self.gradients, *self.buffers]
        return bool(self.layers) and all(row.agrees for row in rows) and not self.notes

    @property
    def first(self) -> Row | None:
        """The first layer whose output differs; then the first gradient or buffer; or None."""
        rows = [*self.layers, *self.gradients, *self.buffers]
        return next((row for row in rows if not row.agrees), None)

    @property
    def largest(self) -> float:
        """The largest difference between outputs of layers."""
        return max((row.difference for row in self.layers), default=0.0)

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        lines = [self._verdict()]
        for title in ("layers", "gradients", "buffers"):
            if rows := getattr(self, title):
                lines += ["", _table(title, rows)]
        if self.weights:
            lines += ["", f"weights that differ: {', '.join(self.weights)}"]
        if self.unpaired:
            lines += ["", f"without counterpart in PyTorch: {', '.join(self.unpaired)}"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _verdict(self) -> str:
        first = self.first
        if first is None:
            return "The models agree." if self.agrees else "The outputs agree; see the notes."
        what = "output of" if first in self.layers else "gradient or buffer"
        lines = [
            f"First difference: {what} {first.name or 'the model'!r} ({first.kind}), "
            f"{first.difference:.3g} at values up to {first.scale:.3g}."
        ]
        return "\n  ".join([*lines, *first.reasons])


def _table(title: str, rows: list[Row]) -> str:
    cells = [
        (
            row.name or "(model)",
            row.torch_name or "(model)",
            row.kind,
            f"{row.difference:.2e}",
            f"{row.scale:.2e}",
            "" if row.agrees else "DIFFERS",
        )
        for row in rows
    ]
    return table((title, "in PyTorch", "type", "difference", "largest value", ""), cells)
