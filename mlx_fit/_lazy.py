"""Names that are imported when they are first used: ``import mlx_fit`` stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, homes: Mapping[str, Iterable[str]], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` (PEP 562) of a package.

    Args:
        package: its ``__name__``.
        homes: module of the package -> names that it defines.
        modules: modules of the package that are names themselves.
    """
    where = {name: home for home, names in homes.items() for name in names}
    own = frozenset(modules)

    def get(name: str) -> Any:
        if name in own:
            return import_module(f"{package}.{name}")
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{where[name]}"), name)
        setattr(sys.modules[package], name, value)  # from now on without this function
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where, *own})

    return get, names
