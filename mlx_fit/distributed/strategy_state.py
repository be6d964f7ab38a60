"""The state of a strategy travels in checkpoints as a callback's does."""

from __future__ import annotations

from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.distributed.ring import Ring
from mlx_fit.distributed.strategy import Strategy


class StrategyState(Callback):
    """Puts the state of a strategy into checkpoints, and takes it back.

    Args:
        strategy: whose.
        ring: the ranks.
    """

    def __init__(self, strategy: Strategy, ring: Ring) -> None:
        self._strategy = strategy
        self._ring = ring

    def state_dict(self) -> dict[str, Any]:
        """Its name and its state."""
        return {"name": self._strategy.name, "state": self._strategy.state_dict(self._ring)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing of another strategy is taken."""
        if state["name"] == self._strategy.name:
            self._strategy.load_state_dict(state["state"], self._ring)
