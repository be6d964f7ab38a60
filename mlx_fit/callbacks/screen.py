"""A few lines at the bottom of a terminal or notebook cell that are drawn over and over."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any


class Screen(ABC):
    """Where live lines are drawn."""

    width: int

    @abstractmethod
    def draw(self, lines: list[str]) -> None:
        """Show these lines in the place of the ones before."""

    @abstractmethod
    def clear(self) -> None:
        """Take the lines away: what is printed next stands there instead."""


class Terminal(Screen):
    """Lines drawn by rich, which also keeps what others print above them."""

    def __init__(self) -> None:
        from rich import get_console

        self._console = get_console()
        self._live: Any = None

    @property
    def width(self) -> int:  # type: ignore[override]
        """Columns; the user may resize the window at any time."""
        return self._console.width

    def draw(self, lines: list[str]) -> None:
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return  # nothing can be drawn over there
        from rich.errors import LiveError
        from rich.live import Live
        from rich.text import Text

        text = Text("\n".join(lines), no_wrap=True, overflow="crop")
        if not self._console.encoding.startswith("utf"):
            text = Text(text.plain.replace("━", "=").replace("─", "-"), no_wrap=True)
        text.highlight_regex("[━=]+", "green")
        text.highlight_regex("─+", "dim")
        if self._live is None:
            live = Live(console=self._console, auto_refresh=False, transient=True)
            try:
                live.start()
            except LiveError:  # before rich 14.1, where the user shows a bar of their own already
                return
            self._live = live
        self._live.update(text, refresh=True)

    def clear(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class Notebook(Screen):
    """One line, drawn over by a carriage return, which every notebook understands."""

    width = 110

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, lines: list[str]) -> None:
        text = lines[-1]
        sys.stdout.write("\r" + text.ljust(self._drawn))
        sys.stdout.flush()
        self._drawn = len(text)

    def clear(self) -> None:
        if self._drawn:
            sys.stdout.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel (Jupyter, Colab, VS Code)."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)
