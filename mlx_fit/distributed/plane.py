"""What watches over the ranks while they wait for each other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Plane(Protocol):
    """Knows which ranks live, beside the collectives, which would wait for ever."""

    def join(self, plan: dict[str, Any]) -> None:
        """Meet the other ranks and compare plans.

        Raises:
            RendezvousError: ranks did not come.
            PlanMismatchError: their plans differ.
        """

    def watching(self, step: int, phase: str) -> AbstractContextManager[Any]:
        """Goes round every collective: a lost, frozen or failed peer ends it in a typed error."""

    def report(self, error: BaseException, step: int) -> None:
        """Tell the others why this rank leaves."""

    def close(self) -> None:
        """Leave in peace."""
