"""What happened to rows on the way, counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Tally"]

_MOST = 20  # numbers and messages kept of each kind: enough to look at, small for any file


@dataclass
class Tally:
    """Rows of one kind.

    Attributes:
        count: how many.
        numbers: lines (or rows) of the first of them.
        messages: for rows that could not be read: why, of the first of them.
        tokens: tokens lost with them.
    """

    count: int = 0
    numbers: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tokens: int = 0

    def add(self, number: int, *, tokens: int = 0, message: str | None = None) -> None:
        """Count a row."""
        self.count += 1
        self.tokens += tokens
        if len(self.numbers) < _MOST:
            self.numbers.append(number)
            if message is not None:
                self.messages.append(message)

    def listed(self) -> str:
        """The numbers in words: ``"4, 9, 12 and 3 more"``."""
        more = self.count - len(self.numbers)
        return ", ".join(map(str, self.numbers)) + (f" and {more} more" if more else "")

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``Tally(**tally.as_dict())`` is the same again."""
        return asdict(self)
