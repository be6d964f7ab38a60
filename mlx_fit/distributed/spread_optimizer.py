"""An optimizer whose state is spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_fit._tree import assign, named_arrays
from mlx_fit.communicator import gather
from mlx_fit.distributed.aligning import from_first
from mlx_fit.distributed.partition import Partition, Sizes
from mlx_fit.distributed.ring import Ring
from mlx_fit.errors import ConfigurationError
from mlx_fit.state import PartialOptimizer

SETTINGS = ("step", "learning_rate")  # the entries of an optimizer's state that are no parameter's
Named = dict[str, mx.array]


class SpreadOptimizer(PartialOptimizer):
    """Updates this rank's part of the weights, and has the state of that part only.

    Args:
        optimizer: any MLX optimizer, but no ``MultiOptimizer``.
        ring: the ranks.
        divide: which rank updates what, a function of the parameters' sizes and of how many ranks
            there are.

    Attributes:
        optimizers: the optimizer that holds this rank's state.
    """

    def __init__(
        self, optimizer: Any, ring: Ring, divide: Callable[[Sizes, int], Partition]
    ) -> None:
        if isinstance(optimizer, optim.MultiOptimizer):
            raise ConfigurationError(
                "The state of a MultiOptimizer cannot be spread over ranks. Use "
                "strategy='data_parallel', or one optimizer."
            )
        self.optimizers = [optimizer]
        self._ring = ring
        self._divide = divide
        self._partition = divide({}, ring.size)
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def state(self) -> dict[str, Any]:
        """This rank's state: the settings, and what belongs to its part of the parameters."""
        state: dict[str, Any] = self.optimizers[0].state
        return state

    @property
    def step(self) -> mx.array:
        """Updates so far."""
        step: mx.array = self.optimizers[0].step
        return step

    @property
    def learning_rate(self) -> Any:
        """The learning rate; to be assigned on all ranks alike."""
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        self.optimizers[0].learning_rate = rate

    def init(self, parameters: Any) -> None:
        """Divide the parameters. Collective where they are others than before."""
        named = dict(named_arrays(parameters))
        sizes = {name: (value.size, str(value.dtype)) for name, value in named.items()}
        if sizes == self._partition.sizes:
            return
        kept = self.whole_state() if self._partition.sizes else {}
        self._partition = self._divide(sizes, self._ring.size)
        self._shapes = {name: value.shape for name, value in named.items()}
        inner = self.optimizers[0]
        for name in [name for name in inner.state if isinstance(inner.state[name], dict)]:
            del inner.state[name]
        inner.init(self._own(named))
        self._put(kept)
        mx.eval(inner.state)

    def update(self, model: nn.Module, gradients: Any) -> None:
        """Update this rank's part of the weights; the others' stay. Sends nothing, see gather."""
        named = dict(named_arrays(gradients))
        parameters = dict(named_arrays(model.trainable_parameters()))
        own = self._own({name: parameters[name] for name in named})
        updated = self.optimizers[0].apply_gradients(self._own(named), own)
        for name, part in updated.items():
            start, stop = self._mine[name]
            assign(model, [(name, _replaced(parameters[name], part, start, stop))])

    def gather(self, model: nn.Module) -> None:
        """Give all ranks the weights that each has updated. Collective."""
        parameters = dict(named_arrays(model.trainable_parameters()))
        mx.eval(parameters)
        if not any(self._partition.spans[1:]):
            assign(model, from_first(self._ring, parameters).items())
            return
        for dtype in dict.fromkeys(value.dtype for value in parameters.values()):
            named = {name: value for name, value in parameters.items() if value.dtype == dtype}
            assign(model, self._gathered(named, dtype).items())

    def _gathered(self, named: Named, dtype: mx.Dtype) -> Named:
        """Parameters of one dtype, each part from the rank that has updated it."""
        spans = [{n: s[n] for n in named if n in s} for s in self._partition.spans]
        lengths = [sum(stop - start for start, stop in part.values()) for part in spans]
        longest = max(lengths)
        own = [named[n].reshape(-1)[a:b] for n, (a, b) in spans[self._ring.rank].items()]
        padding = mx.zeros((longest - lengths[self._ring.rank],), dtype)
        found = self._ring.gather_arrays(mx.concatenate([*own, padding]), "weights")
        pieces: dict[str, list[mx.array]] = {name: [] for name in named}
        for rank, part in enumerate(spans):
            offset = rank * longest
            for name, (start, stop) in part.items():
                pieces[name].append(found[offset : offset + stop - start])
                offset += stop - start
        return {n: mx.concatenate(pieces[n]).reshape(value.shape) for n, value in named.items()}

    # --- this rank's part -------------------------------------------------------------------------

    @property
    def _mine(self) -> dict[str, tuple[int, int]]:
        return self._partition.spans[self._ring.rank]

    def _own(self, named: Named) -> Named:
        """This rank's part of arrays that are shaped like parameters."""
        if not self._partition.is_flat:
            return {name: value for name, value in named.items() if name in self._mine}
        return {
            n: v.reshape(-1)[slice(*self._mine[n])] for n, v in named.items() if n in self._mine
        }

    def _put(self, whole: Mapping[str, mx.array]) -> None:
        """This rank's part of a whole state, put in place; names that it lacks stay as they are."""
        state = self.state
        for name, value in list(state.items()):
            if not isinstance(value, dict):
                state[name] = whole.get(name, value)
                continue
            for key, before in named_arrays(value):
                found = whole.get(f"{name}.{key}")
                if found is not None:
                    is_flat = self._partition.is_flat and found.size > before.size
                    part = found.reshape(-1)[slice(*self._mine[name])] if is_flat else found
                    assign(value, [(key, part.reshape(before.shape))])

    # --- for checkpoints --------------------------------------------------------------------------

    def whole_state(self) -> dict[str, mx.array]:
        """The state as if it had not been spread, by name. Collective."""
        mx.eval(self.state)
        own = {
            name: {
                key: [_raw(v), str(v.dtype).removeprefix("mlx.core."), list(v.shape)]
                for key, v in named_arrays(state)
            }
            for name, state in self.state.items()
            if isinstance(state, dict)
        }
        ranks = gather(self._ring, own)
        found = {n: v for n, v in self.state.items() if isinstance(v, mx.array)}
        for name in self._partition.sizes:
            held = [rank[name] for rank in ranks if name in rank]
            for key in held[0] if held else ():
                parts = [_array(*part[key]) for part in held]
                found[f"{name}.{key}"] = self._joined(name, parts)
        return found

    def _joined(self, name: str, parts: list[mx.array]) -> mx.array:
        whole = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        is_flat = self._partition.is_flat and whole.size == self._partition.sizes[name][0]
        return whole.reshape(self._shapes[name]) if is_flat else whole

    def load_whole_state(self, arrays: Mapping[str, mx.array]) -> None:
        """Take this rank's part of a whole state."""
        self._put(arrays)
        mx.eval(self.state)


def _replaced(whole: mx.array, part: mx.array, start: int, stop: int) -> mx.array:
    """A parameter with some of its elements, in flat order, replaced."""
    if stop - start == whole.size:
        return part.reshape(whole.shape)
    flat = whole.reshape(-1)
    return mx.concatenate([flat[:start], part, flat[stop:]]).reshape(whole.shape)


def _raw(array: mx.array) -> np.ndarray:
    return np.array(array.reshape(-1).view(mx.uint8)) if array.size else np.zeros(0, np.uint8)


def _array(raw: np.ndarray, dtype: str, shape: list[int]) -> mx.array:
    kind = getattr(mx, dtype)
    return mx.array(raw).view(kind).reshape(shape) if raw.size else mx.zeros(shape, kind)
