"""Data modules, which make loaders for each stage of a run, as Lightning has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_fit.errors import DataError

__all__ = ["fit_loaders", "is_data_module", "loader_for", "torn_down"]

# Stage -> the loader asked for; where a module does not make it, that of validation.
_LOADERS = {
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def is_data_module(data: Any) -> bool:
    """Whether ``data`` makes loaders; torch need not be there to tell."""
    return any(callable(getattr(data, f"{kind}_dataloader", None)) for kind in ("train", "val"))


def fit_loaders(module: Any) -> tuple[Any, Any]:
    """The loaders for ``fit``: calls ``prepare_data()`` and ``setup("fit")`` where there are any.

    Returns:
        ``(train, val)``; ``val`` is None where there is none, and a dict of sets for several.

    Raises:
        DataError: there is no ``train_dataloader``.
    """
    if not callable(getattr(module, "train_dataloader", None)):
        raise DataError(
            f"A {type(module).__name__} has no train_dataloader(); give fit a loader as it is."
        )
    _set_up(module, "fit")
    return module.train_dataloader(), _loader(module, "val_dataloader")


def loader_for(module: Any, stage: str) -> Any:
    """The loader for ``"validate"``, ``"test"`` or ``"predict"``: validation's where it has none.

    Raises:
        DataError: it makes none, or several, which are evaluated one by one.
    """
    _set_up(module, stage)
    for name in (_LOADERS[stage], "val_dataloader"):
        found = _loader(module, name)
        if isinstance(found, dict):
            raise DataError(
                f"{type(module).__name__}.{name}() gives {len(found)} loaders; evaluate them one "
                "by one."
            )
        if found is not None:
            return found
    raise DataError(f"A {type(module).__name__} gives no loader to {stage} with.")


@contextmanager
def torn_down(data: Any, stage: str) -> Iterator[None]:
    """A data module is told that its stage is over, by ``teardown(stage)``, also after an error."""
    try:
        yield
    finally:
        if is_data_module(data) and callable(teardown := getattr(data, "teardown", None)):
            teardown(stage)


def _set_up(module: Any, stage: str) -> None:
    for name, arguments in (("prepare_data", ()), ("setup", (stage,))):
        if callable(method := getattr(module, name, None)):
            method(*arguments)


def _loader(module: Any, name: str) -> Any:
    """What the method gives; several loaders by their number, or by their names."""
    make = getattr(module, name, None)
    found = make() if callable(make) else None
    if isinstance(found, list | tuple):
        several = {str(number): loader for number, loader in enumerate(found)}
        return several if len(found) > 1 else (found[0] if found else None)
    return found or None if isinstance(found, dict) else found
