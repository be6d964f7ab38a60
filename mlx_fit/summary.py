"""A table of a model's layers and parameters."""

from __future__ import annotations

import mlx.nn as nn

from mlx_fit._tree import named_arrays


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
    num_all = num_trained = num_bytes = 0
    for name, module in reversed(model.named_modules()):
        own = [(k, v) for k, v in named_arrays(module.parameters()) if "." not in k]
        if not own:
            continue
        trained = {k for k, _ in named_arrays(module.trainable_parameters()) if "." not in k}
        count = sum(v.size for _, v in own)
        count_trained = sum(v.size for k, v in own if k in trained)
        num_all, num_trained = num_all + count, num_trained + count_trained
        num_bytes += sum(v.nbytes for _, v in own)
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in own)
        kind = type(module).__name__
        table.add_row(name or "(model)", kind, shapes, f"{count:,}", f"{count_trained:,}")
    console = Console()
    console.print(table)
    console.print(
        f"{num_all:,} parameters, {num_trained:,} trained, {num_all - num_trained:,} frozen, "
        f"{num_bytes / 2**20:,.2f} MiB of weights"
    )
