"""How much of a model trains, and what that saves: counted from shapes, nothing is evaluated."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit._tree import named_arrays
from mlx_fit.finetune.blocks import is_quantized, ordered_modules
from mlx_fit.finetune.select import own_parameters


@dataclass(frozen=True)
class Statistics:
    """What trains and what is frozen. ``print`` it for a table.

    Attributes:
        num_trainable, num_frozen: parameters; those of quantized layers count unpacked, running
            statistics and the scales of quantized layers do not count.
        trainable_bytes, frozen_bytes: of the arrays as they are.
        optimizer_bytes_before: state of the optimizer if every floating-point parameter trained.
        optimizer_bytes_after: its state for what trains now.
    """

    num_trainable: int
    num_frozen: int
    trainable_bytes: int
    frozen_bytes: int
    optimizer_bytes_before: int
    optimizer_bytes_after: int

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self.num_trainable + self.num_frozen

    @property
    def ratio(self) -> float:
        """Share of the parameters that trains, 0 to 1."""
        return self.num_trainable / self.num_parameters if self.num_parameters else 0.0

    def __str__(self) -> str:
        rows = [
            ("", "parameters", "bytes"),
            ("trainable", f"{self.num_trainable:,}", f"{self.trainable_bytes:,}"),
            ("frozen", f"{self.num_frozen:,}", f"{self.frozen_bytes:,}"),
            ("trainable share", f"{self.ratio:.4%}", ""),
            ("optimizer, all training", "", f"{self.optimizer_bytes_before:,}"),
            ("optimizer, as it is", "", f"{self.optimizer_bytes_after:,}"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows
        )


def statistics(model: nn.Module, optimizer: Any = None) -> Statistics:
    """Count a model's trainable and frozen parameters, their bytes and the optimizer's.

    Only shapes are looked at: a model whose arrays were never evaluated stays so.

    Args:
        model: the model. Arrays that several modules share count once.
        optimizer: an MLX optimizer; None: AdamW, two numbers a parameter. It is not changed.

    Example:
        >>> import mlx.nn as nn
        >>> model = nn.Linear(1000, 10).freeze(keys="weight")
        >>> print(statistics(model))
                                 parameters   bytes
        trainable                        10      40
        frozen                       10,000  40,000
        trainable share             0.0999%
        optimizer, all training              80,092
        optimizer, as it is                      92
    """
    modules = ordered_modules(model)
    trainable = {id(array) for _, array in named_arrays(model.trainable_parameters())}
    counts = {True: 0, False: 0}
    sizes = {True: 0, False: 0}
    floats: dict[str, mx.array] = {}
    seen: set[int] = set()
    arrays = dict(named_arrays(model.parameters()))
    for owner, module in modules:
        for key, paths in own_parameters(module).items():
            for path in paths:
                name = f"{owner}.{path}" if owner else path
                array = arrays[name]
                if id(array) in seen:
                    continue
                seen.add(id(array))
                trains = id(array) in trainable
                counts[trains] += _num_parameters(module, key, array)
                sizes[trains] += array.nbytes
                if _could_train(module, key, array):
                    floats[name] = array
    optimizer = optim.AdamW(1e-3) if optimizer is None else optimizer
    trained = {name: array for name, array in arrays.items() if id(array) in trainable}
    return Statistics(
        counts[True],
        counts[False],
        sizes[True],
        sizes[False],
        state_bytes(optimizer, floats),
        state_bytes(optimizer, trained),
    )


def state_bytes(optimizer: Any, parameters: dict[str, mx.array]) -> int:
    """Bytes of a fresh optimizer's state for these parameters, without evaluating any."""
    parts = getattr(optimizer, "optimizers", None)
    if parts is None:
        return _fresh_bytes(optimizer, parameters)
    total, rest = 0, dict(parameters)
    for part, takes in zip(parts, [*optimizer.filters], strict=True):
        own = {name: array for name, array in rest.items() if takes(name, array)}
        rest = {name: array for name, array in rest.items() if name not in own}
        total += _fresh_bytes(part, own)
    return total


def _fresh_bytes(optimizer: Any, parameters: dict[str, mx.array]) -> int:
    fresh = copy.copy(optimizer)
    fresh._state = {
        k: optimizer.state[k] for k in ("step", "learning_rate") if k in optimizer.state
    }
    # Integers for names: dots would not matter, but a parameter called "step" would.
    fresh.init({f"p{i}": array for i, array in enumerate(parameters.values())})
    return sum(array.nbytes for _, array in named_arrays(fresh.state))


def _num_parameters(module: nn.Module, key: str, array: mx.array) -> int:
    if key.startswith("running_"):
        return 0
    if is_quantized(module) and key != "bias":
        return array.size * 32 // module.bits if key == "weight" else 0
    return array.size


def _could_train(module: nn.Module, key: str, array: mx.array) -> bool:
    is_float = mx.issubdtype(array.dtype, mx.inexact)
    is_packed = is_quantized(module) and key != "bias"
    return is_float and not is_packed and not key.startswith("running_")
