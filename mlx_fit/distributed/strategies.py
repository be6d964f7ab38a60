"""Strategies by name."""

from __future__ import annotations

from typing import Any

from mlx_fit.distributed.local import DiLoCo, LocalSGD
from mlx_fit.distributed.strategy import Strategy
from mlx_fit.distributed.synchronous import DataParallel, ParameterServer, Zero1
from mlx_fit.errors import ConfigurationError

BY_NAME: dict[str, type[Strategy]] = {
    "data_parallel": DataParallel,
    "zero1": Zero1,
    "parameter_server": ParameterServer,
    "local_sgd": LocalSGD,
    "diloco": DiLoCo,
}


def strategy_of(value: Any) -> Strategy:
    """A strategy as it is; a name as the strategy with its defaults.

    Raises:
        ConfigurationError: it is neither.
    """
    if isinstance(value, Strategy):
        return value
    if isinstance(value, str) and value in BY_NAME:
        return BY_NAME[value]()
    raise ConfigurationError(
        f"strategy={value!r}; expected {', '.join(map(repr, BY_NAME))}, or a strategy object such "
        "as mlx_fit.distributed.DataParallel()."
    )
