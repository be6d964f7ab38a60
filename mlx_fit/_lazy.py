"""Names that are imported when they are first used: ``import mlx_fit`` stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str,
    homes: Mapping[str, Iterable[str]],
    modules: Iterable[str] = (),
    packages: Iterable[str] = (),
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` (PEP 562) of a package.

    Args:
        package: its ``__name__``.
        homes: module of the package -> names that it defines.
        modules: modules of the package that are names themselves.
        packages: lazy packages in it, all of whose names are its own as well.
    """
    where = {name: home for home, names in homes.items() for name in names}
    own, inner_packages = frozenset(modules), tuple(packages)

    def get(name: str) -> Any:
        if name in own:
            return import_module(f"{package}.{name}")
        if name not in where:
            for inner in inner_packages:
                module = import_module(f"{package}.{inner}")
                if name in module.__all__:
                    return getattr(module, name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{where[name]}"), name)
        setattr(sys.modules[package], name, value)  # from now on without this function
        return value

    def names() -> list[str]:
        inner = {n for p in inner_packages for n in import_module(f"{package}.{p}").__all__}
        return sorted({*vars(sys.modules[package]), *where, *own, *inner})

    return get, names
