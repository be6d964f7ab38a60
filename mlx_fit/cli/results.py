"""What a run came to, as a table at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mlx_fit.callbacks.format import format_value
from mlx_fit.errors import ConfigurationError
from mlx_fit.history import History


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and what belongs to them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, text in rows:
        table.add_row(name, text)
    Console().print(table)


def print_history(
    title: str,
    history: History,
    num_steps: int,
    seconds: float,
    tested: Mapping[str, float],
    written: Mapping[str, Path],
) -> None:
    """Print the last and the best values of a run, its time, and where its files are.

    Args:
        title: of the table.
        history: the whole run's.
        num_steps: the whole run's updates.
        seconds: that were spent now.
        tested: values of the test data, if there are any.
        written: paths by what they hold.
    """
    number = len(history.epoch)
    epochs = f"{number} epoch{'' if number == 1 else 's'}"
    updates = f"{num_steps} update{'' if num_steps == 1 else 's'}"
    rows = [("time", f"{seconds:.1f} s"), ("trained", f"{updates}, {epochs}")]
    if history.stopped_by:
        rows.append(("stopped by", history.stopped_by))
    rows += [(key, text) for key in history.history if (text := _values(history, key))]
    rows += [(f"test {key}", format_value(value)) for key, value in tested.items()]
    rows += [(name, str(path)) for name, path in written.items()]
    print_table(title, rows)


def _values(history: History, key: str) -> str:
    """The last value, and the best with its epoch, from 1; empty for what is no number."""
    last = history.history[key][-1]
    if not isinstance(last, (int, float)):
        return ""
    try:
        epoch, best = history.best(key)
    except ConfigurationError:  # nobody declared its direction
        return format_value(last)
    return f"{format_value(last)} (best: {format_value(best)}, epoch {epoch + 1})"
