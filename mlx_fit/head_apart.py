"""Whether models' heads can be run apart from their bodies, looked at once for each model.

May import nothing of its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit._tree import RandomState
from mlx_fit.body_head import SplitModel, check_split, logits_of, num_embeddings
from mlx_fit.errors import ConfigurationError
from mlx_fit.modes import evaluation_mode


class HeadApart:
    """What is known of the models of an objective.

    Args:
        chunk_size: tokens whose logits are in memory at a time; not None: heads must stand apart.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self.chunk_size = chunk_size
        self._found: dict[int, bool] = {}  # by id of the model

    def forget(self) -> None:
        """Models may have other heads now."""
        self._found.clear()

    def look_at(self, model: nn.Module) -> None:
        """See whether a model's head can be run by itself. Computes: not for a trace.

        Raises:
            ConfigurationError: it cannot, and ``chunk_size`` needs it.
        """
        if id(model) in self._found:
            return
        self._found[id(model)], random_state = False, RandomState()
        try:
            with evaluation_mode(model):
                check_split(model, num_embeddings(model) or 1, lambda out: logits_of(out, None))
        except ConfigurationError:
            if self.chunk_size is not None:
                raise
        except Exception:
            # Whatever it is that the model needs, it does not run on tokens alone.
            return
        else:
            self._found[id(model)] = True
        finally:
            random_state.restore()

    @property
    def never(self) -> bool:
        """Whether models were looked at, and none of their heads stands apart."""
        return bool(self._found) and not any(self._found.values())

    def run(
        self,
        model: nn.Module,
        tokens: mx.array,
        kept: int | None,
        forward: Callable[[Any], Any] | None = None,
    ) -> SplitModel | Any:
        """The model run with its body's output kept, or what it returns where that is of no use.

        Args:
            model: the model.
            tokens: shape (batch, length).
            kept: positions whose logits are needed; None: all.
            forward: runs the model; ``model(tokens)`` by itself.
        """
        forward = forward or (lambda model: model(tokens))
        if self.chunk_size is None and (kept is None or not self._found.get(id(model))):
            return forward(model)
        return SplitModel(model, tokens, forward, lambda outputs: logits_of(outputs, None))
