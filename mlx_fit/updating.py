"""The update at the end of a window: clip, apply, and what is logged of it. Traced, never run.

May import: ``objective``, ``options``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_fit import gradients as grad
from mlx_fit._tree import select, snapshot
from mlx_fit.logs import Sums, divide, nonzero_total, total, unlogged
from mlx_fit.objective import Terms
from mlx_fit.options import StepOptions
from mlx_fit.precision import next_scale

SCALE_ENDED = "loss_scale_ended"  # not finite where the loss scale fell below 1
Entries = dict[str, dict[str, mx.array]]


class Update:
    """Applies averaged gradients to a model, inside the compiled step.

    Args:
        model, optimizer: what is updated, and by what.
        options: how.
        scaling: the state of the loss scale, empty without.
        sums: where packed vectors get their places.
        is_alone: whether gradients come from a backward pass here, and not from several ranks.

    Attributes:
        masks_weight: set by a trace: whether a window counts, the device must say.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        options: StepOptions,
        scaling: dict[str, mx.array],
        sums: Sums,
        is_alone: bool,
    ) -> None:
        self.masks_weight = False
        self._model = model
        self._optimizer = optimizer
        self._options = options
        self._scaling = scaling
        self._sums = sums
        self._is_alone = is_alone

    def from_window(self, norms: bool | None, window: list[Any]) -> mx.array:
        """The update of an accumulated window: one division by its whole weight.

        ``norms``: see :meth:`apply`.
        """
        gradients, weight, num_bad = window
        conditions, overflowed = [], None
        if self.masks_weight or self._options.masks_bad_batches:
            conditions.append(weight > 0)
            weight = mx.where(weight > 0, weight, 1.0)
        if self._scaling:
            overflowed = num_bad > 0
            conditions.append(mx.logical_not(overflowed))
        gradients = tree_map(lambda g: g / weight, gradients)
        entries = self.apply(gradients, conditions, overflowed, norms)
        return self._sums.place(entries) if entries else mx.zeros_like(self._sums.lanes)

    def apply(
        self,
        gradients: Any,
        conditions: list[mx.array],
        overflowed: mx.array | None,
        norms: bool | None,
    ) -> Entries:
        """Clip and apply averaged gradients where all conditions hold; what to log about it.

        ``norms`` tells whether the norms of each layer's gradient are measured; None: no update
        logs them, and they have no place.
        """
        options, model, optimizer = self._options, self._model, self._optimizer
        entries = self.nothing(norms)
        norm: mx.array | None = None
        layer_norms: mx.array | None = None
        transposed = grad.linear_weights(model) if self._is_alone else ()
        if norms:
            layer_norms = grad.layer_norms(model, gradients, transposed)
            norm = mx.sqrt(layer_norms.square().sum())
        if options.clip_norm is not None:
            norm = grad.global_norm(gradients, transposed)
            gradients = grad.clip_by_norm(gradients, norm, options.clip_norm)
        if options.clip_value is not None:
            gradients = grad.clip_by_value(gradients, options.clip_value)
        parameters = model.trainable_parameters()
        gradients = tree_map(lambda g, p: g.astype(p.dtype), gradients, parameters)
        applies: mx.array | None = None
        if conditions:
            applies = mx.stack(conditions).all()
            before = snapshot(parameters), snapshot(optimizer.state)
        optimizer.update(model, gradients)
        if applies is not None:
            parameters = model.trainable_parameters()
            select(applies, parameters, before[0])
            model.update(parameters)
            select(applies, optimizer.state, before[1])
            entries["skipped_updates"] = {"sum": mx.where(applies, 0.0, 1.0)}
        if norm is not None:
            entries["grad_norm"] = _counted(norm, applies)
            if layer_norms is not None:
                entries["layer_grad_norms"] = _counted(layer_norms, applies)
        if self._scaling and overflowed is not None:
            self._scaling.update(next_scale(self._scaling, overflowed))
            # An overflow is no error, until the scale has nowhere left to go.
            has_ended = overflowed & (self._scaling["scale"] < 1)
            entries[SCALE_ENDED] = {"sum": mx.where(has_ended, math.nan, 0.0)}
        return entries

    def nothing(self, norms: bool | None) -> Entries:
        """Entries of the packed vector that only an update fills."""
        zero = mx.array(0.0)
        entries: Entries = {}
        if self._options.clip_norm is not None or norms is not None:
            entries["grad_norm"] = {"sum": zero, "weight": zero}
        if norms is not None:
            zeros = mx.zeros((len(grad.layer_names(self._model)),))
            entries["layer_grad_norms"] = {"sum": zeros, "weight": zero}
        if self._options.masks_bad_batches or self.masks_weight:
            entries["skipped_updates"] = {"sum": zero}
        if self._scaling:
            entries[SCALE_ENDED] = {"sum": zero}
        return entries

    def pack(self, terms: Terms, entries: Entries) -> mx.array:
        """The packed sums of a batch, and of its update."""
        computes = dict(terms.computes)
        if "grad_norm" in entries:
            computes["grad_norm"] = divide
        if "layer_grad_norms" in entries:
            computes["layer_grad_norms"] = grad.named_norms(self._model)
        if "skipped_updates" in entries:
            masks = self._options.masks_bad_batches
            computes["skipped_updates"] = total if masks else nonzero_total
        if SCALE_ENDED in entries:
            computes[SCALE_ENDED] = unlogged
        states = terms.states
        if self._options.masks_bad_batches:
            # Gradients alone may overflow: then the loss still counts.
            is_finite = mx.isfinite(terms.mean)
            keep = partial(tree_map, lambda value: mx.where(is_finite, value, 0))
            states, terms.rows = keep(states), keep(terms.rows)
        return self._sums.pack(states | entries, computes)


def _counted(value: mx.array, applies: mx.array | None) -> dict[str, mx.array]:
    """A value of an update for its mean over updates; one that is not applied does not count."""
    if applies is None:
        return {"sum": value, "weight": mx.array(1.0)}
    return {"sum": mx.where(applies, value, 0.0), "weight": applies.astype(mx.float32)}
