"""Optimizers with PyTorch's arguments, defaults and arithmetic, for any MLX model.

MLX's own differ in places: ``Adam`` and ``AdamW`` leave out the bias correction by default,
``Adam`` and ``RMSprop`` have no ``weight_decay``, ``RMSprop`` no momentum, and ``SGD`` applies
dampening to the first gradient too. Formulas: the pages of ``torch.optim`` for each class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import mlx.optimizers as optim

from mlx_fit.checks import boolean, number
from mlx_fit.errors import ConfigurationError

Rate = float | Callable[[mx.array], mx.array]
P = ParamSpec("P")
R = TypeVar("R")


def _without_parameters(make: Callable[P, R]) -> Callable[P, R]:
    """Refuse the parameters that PyTorch's optimizers take, before Python counts arguments."""

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        own = isinstance(args[0], optim.Optimizer) if args else False
        given: Any = args[own] if len(args) > own else None
        is_rate = callable(given) or isinstance(given, (str, mx.array)) or _is_scalar(given)
        if "params" in kwargs or (isinstance(given, Iterable) and not is_rate):
            name = type(args[0]).__name__ if own else make.__name__
            raise ConfigurationError(
                f"{name} got parameters first, as in PyTorch; MLX's optimizers get them with every "
                f"update. Write Trainer(model, {name}(lr=...)); for groups with settings of their "
                f"own, param_groups(model, {name}, groups, lr=...)."
            )
        return make(*args, **kwargs)

    return checked


def _is_scalar(value: Any) -> bool:
    return getattr(value, "ndim", None) == 0


class SGD(optim.Optimizer):
    """``torch.optim.SGD``.

    Args:
        lr: learning rate, or a schedule of the number of updates made.
        momentum: share of the last update that is kept.
        dampening: share of the gradient that is left out of the momentum, from the second update.
        weight_decay: factor of the weights that is added to their gradients.
        nesterov: Nesterov's momentum.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    @_without_parameters
    def __init__(
        self,
        lr: Rate = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", _rate(lr))
        self.momentum = number("momentum", momentum, 0)
        self.dampening = number("dampening", dampening)
        self.weight_decay = number("weight_decay", weight_decay, 0)
        self.nesterov = boolean("nesterov", nesterov)
        if nesterov and (not momentum or dampening):
            raise ConfigurationError("nesterov=True needs a momentum and dampening=0.")

    def init_single(self, parameter: mx.array, state: dict) -> None:
        if self.momentum:
            state["v"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        gradient = _decayed(gradient, parameter, self.weight_decay)
        if not self.momentum:
            return parameter - rate * gradient
        fresh = gradient
        if self.dampening:
            share = mx.where(self.step == 1, 1.0, 1 - self.dampening)
            fresh = share.astype(gradient.dtype) * gradient
        state["v"] = velocity = self.momentum * state["v"] + fresh
        return parameter - rate * (
            gradient + self.momentum * velocity if self.nesterov else velocity
        )


class Adam(optim.Optimizer):
    """``torch.optim.Adam``: bias correction always, ``weight_decay`` as an L2 penalty.

    Args:
        lr: learning rate, or a schedule of the number of updates made.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: factor of the weights that is added to their gradients.
        amsgrad: divide by the largest average so far.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    @_without_parameters
    def __init__(
        self,
        lr: Rate = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", _rate(lr))
        self.betas = _betas(betas)
        self.eps = number("eps", eps, 0)
        self.weight_decay = number("weight_decay", weight_decay, 0)
        self.amsgrad = boolean("amsgrad", amsgrad)
        self.bias_correction = True

    def init_single(self, parameter: mx.array, state: dict) -> None:
        for key in ("m", "v", "largest")[: 3 if self.amsgrad else 2]:
            state[key] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        first, second = self.betas
        gradient = _decayed(gradient, parameter, self.weight_decay)
        state["m"] = mean = first * state["m"] + (1 - first) * gradient
        state["v"] = square = second * state["v"] + (1 - second) * mx.square(gradient)
        if self.amsgrad:
            state["largest"] = square = mx.maximum(state["largest"], square)
        scale = mx.rsqrt(1 - second**self.step).astype(gradient.dtype)
        rate = rate / (1 - first**self.step).astype(gradient.dtype)
        return parameter - rate * mean / (mx.sqrt(square) * scale + self.eps)


@_without_parameters
def AdamW(  # noqa: N802
    lr: Rate = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> optim.AdamW:
    """``torch.optim.AdamW``: MLX's own with the bias correction and PyTorch's defaults.

    Args:
        lr: learning rate, or a schedule of the number of updates made.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: share of the weights, times the rate, taken off at every update.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    return optim.AdamW(
        _rate(lr),
        list(_betas(betas)),
        number("eps", eps, 0),
        number("weight_decay", weight_decay, 0),
        bias_correction=True,
    )


class RMSprop(optim.Optimizer):
    """``torch.optim.RMSprop``.

    Args:
        lr: learning rate, or a schedule of the number of updates made.
        alpha: decay of the average of the squared gradient.
        eps: added to the denominator.
        weight_decay: factor of the weights that is added to their gradients.
        momentum: share of the last update that is kept.
        centered: divide by the standard deviation instead of the root of the mean square.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    @_without_parameters
    def __init__(
        self,
        lr: Rate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", _rate(lr))
        self.alpha = number("alpha", alpha, 0, 1)
        self.eps = number("eps", eps, 0)
        self.weight_decay = number("weight_decay", weight_decay, 0)
        self.momentum = number("momentum", momentum, 0)
        self.centered = boolean("centered", centered)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        keys = {"v": True, "mean": self.centered, "buffer": self.momentum > 0}
        for key in (key for key, is_used in keys.items() if is_used):
            state[key] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        gradient = _decayed(gradient, parameter, self.weight_decay)
        state["v"] = square = self.alpha * state["v"] + (1 - self.alpha) * mx.square(gradient)
        if self.centered:
            state["mean"] = mean = self.alpha * state["mean"] + (1 - self.alpha) * gradient
            square = square - mx.square(mean)
        update = gradient / (mx.sqrt(square) + self.eps)
        if self.momentum:
            state["buffer"] = update = self.momentum * state["buffer"] + update
        return parameter - rate * update


def _decayed(gradient: mx.array, parameter: mx.array, weight_decay: float) -> mx.array:
    return gradient + weight_decay * parameter if weight_decay else gradient


def _rate(lr: Rate) -> Rate:
    return lr if callable(lr) else number("lr", lr, 0)


def _betas(betas: Sequence[float]) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigurationError(f"betas={betas!r}; expected two numbers.")
    return number("betas[0]", betas[0], 0, 1), number("betas[1]", betas[1], 0, 1)
