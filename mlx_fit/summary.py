"""A table of a model's layers and parameters."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import named_arrays
from mlx_fit.runtime.memory import format_bytes


def print_summary(model: nn.Module) -> None:
    """Print one row per layer that holds parameters, and the totals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=type(model).__name__)
    for heading, justify in (
        ("layer", "left"),
        ("type", "left"),
        ("shapes", "left"),
        ("parameters", "right"),
        ("trained", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    trained = {name for name, _ in named_arrays(model.trainable_parameters())}
    modules = dict(model.named_modules())
    num_all = num_trained = num_bytes = 0
    for name, own in _by_module(model, modules).items():
        count = sum(array.size for array in own.values())
        count_trained = sum(array.size for path, array in own.items() if path in trained)
        num_all, num_trained = num_all + count, num_trained + count_trained
        num_bytes += sum(array.nbytes for array in own.values())
        shapes = ", ".join(
            f"{path.removeprefix(name + '.')} {tuple(array.shape)}" for path, array in own.items()
        )
        kind = type(modules[name]).__name__
        table.add_row(name or "(model)", kind, shapes, f"{count:,}", f"{count_trained:,}")
    console = Console()
    console.print(table)
    console.print(
        f"{num_all:,} parameters, {num_trained:,} trained, {num_all - num_trained:,} frozen, "
        f"{format_bytes(num_bytes)} of weights"
    )


def _by_module(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, dict[str, mx.array]]:
    """Parameters by the innermost module that holds them; shared ones once."""
    found: dict[str, dict[str, mx.array]] = {}
    seen: set[int] = set()
    for path, array in named_arrays(model.parameters()):
        if id(array) in seen:
            continue
        seen.add(id(array))
        owner = path
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        found.setdefault(owner, {})[path] = array
    return found
