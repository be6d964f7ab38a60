"""Putting a saved state into a model and an optimizer: all of it, or nothing.

Imports layer 2: checkpoint.arrays, checkpoint.format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import RandomState, assign, named_arrays
from mlx_fit.checkpoint.arrays import sha256_of
from mlx_fit.checkpoint.format import frozen_names
from mlx_fit.errors import CheckpointMismatchError
from mlx_fit.rates import follow_schedules
from mlx_fit.state import (
    check_buffers,
    check_optimizer,
    check_parameters,
    put_buffers,
    put_optimizer,
)
from mlx_fit.trainable import trainable_names


def check_state(
    model: nn.Module, optimizer: Any, state: Mapping[str, Any], trainable: list[str], source: str
) -> None:
    """Raise unless a saved state fits.

    Args:
        model, optimizer: where it is to go.
        state: the ``trainer`` part of a :class:`~mlx_fit.state.TrainState`.
        trainable: names of what was trained.
        source: where it comes from, for the message.

    Raises:
        CheckpointMismatchError: lists the names that do not fit.
    """
    frozen = state.get("frozen", {})
    mine = dict(named_arrays(model.parameters()))
    arrays = state["model"] | {name: mine[name] for name in frozen if name in mine}
    arrays |= {name: mx.zeros(facts["shape"]) for name, facts in frozen.items() if name not in mine}
    check_parameters(model, arrays, strict=True, source=source)
    mx.eval([mine[name] for name in frozen])
    others = [name for name, facts in frozen.items() if sha256_of(mine[name]) != facts["sha256"]]
    if others:
        raise CheckpointMismatchError(
            f"{source} expects a base model that is loaded already, and these frozen parameters "
            f"differ from those it was trained with: {', '.join(others)}. Load the same base.",
            missing=others,
        )
    check_buffers(model, state["buffers"], source)
    # A callback may freeze or thaw before the optimizer's turn comes; then it is checked there.
    if optimizer is not None and set(trainable) == set(trainable_names(model)):
        optimizer.init(model.trainable_parameters())
        check_optimizer(optimizer, state["optimizer"])


def put_state(
    model: nn.Module,
    optimizer: Any,
    scaling: dict[str, mx.array],
    state: Mapping[str, Any],
    with_optimizer: bool = True,
) -> None:
    """Put weights, optimizer state, loss scale and random key in place, in the same containers.

    Args:
        model, optimizer, scaling: where they go.
        state: from :func:`check_state`'s caller.
        with_optimizer: False leaves the optimizer for later.

    Raises:
        CheckpointMismatchError: the optimizer's state is that of other parameters.
    """
    mine = dict(named_arrays(model.parameters()))
    # Running statistics may have grown wider than the layer was made; weights are as they are now.
    cast = {*trainable_names(model), *frozen_names(model)}
    weights = state["model"].items()
    assign(model, [(n, a.astype(mine[n].dtype) if n in cast else a) for n, a in weights])
    put_buffers(model, state["buffers"])
    if optimizer is not None and with_optimizer and state["optimizer"]:
        optimizer.init(model.trainable_parameters())
        check_optimizer(optimizer, state["optimizer"])
        put_optimizer(optimizer, state["optimizer"])
        follow_schedules(optimizer)
    if scaling.keys() == state["loss_scale"].keys():
        scaling.update(state["loss_scale"])
    mx.eval(model.state, scaling)  # lazy casts would belong to this thread
    RandomState(state["random_key"]).restore()
