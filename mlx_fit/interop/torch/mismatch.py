"""The error for weights that do not fit: both names, both shapes, the nearest candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

import mlx.core as mx

from mlx_fit.errors import CheckpointMismatchError
from mlx_fit.interop.torch.slots import Shape, Slot

_NUM_LISTED = 20


class Mismatch:
    """What does not fit between a model's slots and the tensors of a state.

    Attributes:
        missing: slots of which a tensor is not there.
        misshapen: (slot, its tensor, the tensor's shape).
        extra: tensors that no slot takes.
    """

    def __init__(
        self, slots: Iterable[Slot], state: Mapping[str, mx.array], extra: Iterable[str]
    ) -> None:
        slots = list(slots)
        self.extra = list(extra)
        self.missing = [slot for slot in slots if any(s not in state for s in slot.sources)]
        self.misshapen = [
            (slot, source, tuple(state[source].shape))
            for slot in slots
            for source, shape in zip(slot.sources, slot.source_shapes, strict=True)
            if source in state and tuple(state[source].shape) != shape
        ]
        self._state = state

    def __bool__(self) -> bool:
        return bool(self.missing or self.misshapen or self.extra)

    def error(self, what: str) -> CheckpointMismatchError:
        """An error that lists everything.

        Args:
            what: what was attempted and did not happen.
        """
        lines = [
            *(self._misshapen_line(*entry) for entry in self.misshapen),
            *(self._missing_line(slot) for slot in self.missing),
            *(self._extra_line(name) for name in self.extra),
        ]
        if len(lines) > _NUM_LISTED:
            lines[_NUM_LISTED:] = [f"... and {len(lines) - _NUM_LISTED} more"]
        return CheckpointMismatchError(
            "\n  ".join([f"The weights do not fit the model; {what}.", *lines, *self._advice()]),
            missing=[name for slot in self.missing for name in slot.names],
            extra=self.extra,
            misshapen={slot.names[0]: (found, slot.shapes[0]) for slot, _, found in self.misshapen},
        )

    def _misshapen_line(self, slot: Slot, source: str, found: Shape) -> str:
        expected = slot.source_shapes[slot.sources.index(source)]
        hint = ""
        if found == expected[::-1] and len(found) == 2:
            hint = "; it looks transposed (transformers' Conv1D): give tensor.T"
        elif num_groups := _groups(found, expected):
            hint = (
                f"; PyTorch's layer has groups={num_groups}: give this one as many (MLX's "
                "transposed convolutions have none: use one layer for each group)"
            )
        return f"{_described(slot)}: torch's {source!r} is {found}, expected {expected}{hint}"

    def _missing_line(self, slot: Slot) -> str:
        absent = [source for source in slot.sources if source not in self._state]
        shape = slot.source_shapes[slot.sources.index(absent[0])]
        candidates = {name: tuple(self._state[name].shape) for name in self.extra or self._state}
        return (
            f"{_described(slot)}: there is no {' or '.join(map(repr, absent))} {shape}; nearest: "
            f"{nearest(absent[0], shape, candidates)}"
        )

    def _extra_line(self, name: str) -> str:
        shape = tuple(self._state[name].shape)
        candidates = {
            source: source_shape
            for slot in self.missing
            for source, source_shape in zip(slot.sources, slot.source_shapes, strict=True)
        }
        near = f"; nearest expected: {nearest(name, shape, candidates)}" if candidates else ""
        return f"torch's {name!r} {shape} has no place in the model{near}"

    def _advice(self) -> list[str]:
        advice = []
        if any("in_proj_bias" in name for name in self.extra):
            advice.append(
                "The attention has biases in PyTorch: make it nn.MultiHeadAttention(dims, heads, "
                "bias=True), also inside of nn.TransformerEncoderLayer, which makes it without."
            )
        if any(".parametrizations." in name for name in self.extra):
            advice.append(
                "A parametrization cannot be computed from its tensors here: call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first."
            )
        if self.missing and self.extra:
            advice.append("Other names go through rename={'torch name': 'name expected here'}.")
        elif self.extra:
            advice.append(
                "Drop what the model computes itself with rename={'torch name': None}, or all of "
                "it with strict=False."
            )
        elif self.missing:
            advice.append("A model that has more than the weights takes them with strict=False.")
        return advice


def nearest(name: str, shape: Shape, candidates: Mapping[str, Shape]) -> str:
    """The up to three names most like ``name``, those of its shape first."""
    ranked = sorted(
        candidates,
        key=lambda other: (
            candidates[other] != shape,
            -SequenceMatcher(None, name, other).ratio(),
        ),
    )
    return ", ".join(f"{other!r} {candidates[other]}" for other in ranked[:3]) or "nothing is left"


def _groups(found: Shape, expected: Shape) -> int:
    """The groups of a convolution whose counterpart has none; 0 where that is not what differs."""
    alike = (
        len(found) == len(expected) > 2 and found[::2] + found[3:] == expected[::2] + expected[3:]
    )
    return expected[1] // found[1] if alike and found[1] and expected[1] % found[1] == 0 else 0


def _described(slot: Slot) -> str:
    return ", ".join(f"{n!r} {s}" for n, s in zip(slot.names, slot.shapes, strict=True))
