"""Objects that a file of settings names: ``use`` says what, the other keys are its arguments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_fit import errors
from mlx_fit._tree import leaves
from mlx_fit.cli.settings import UsageError, known, nearest
from mlx_fit.errors import ConfigurationError, MlxFitError

ROOT = str(Path(errors.__file__).parent)
USE, ARGS = "use", "args"  # keys of a table: the name, and arguments by position
OWN_NAME = re.compile(r"[^\s:]+\.py:[A-Za-z_][\w.]*")


class RunFailedError(MlxFitError):
    """Code of the user raised something."""


@contextmanager
def own_code() -> Iterator[None]:
    """Inside, code of the user runs: what it raises becomes one line, with its place."""
    try:
        yield
    except (MlxFitError, OSError):
        raise
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        of_others = [place for place in places if "site-packages" not in place.filename]
        of_user = [place for place in of_others if not place.filename.startswith(ROOT)]
        place = (of_user or places)[-1]
        text, file, line = str(error), place.filename, place.lineno
        if isinstance(error, SyntaxError) and error.filename:
            text, file, line = error.msg, error.filename, error.lineno
        raise RunFailedError(
            f"{type(error).__name__}: {text} ({file}, line {line}; --debug shows the traceback)"
        ) from error


@dataclass(frozen=True)
class Names:
    """What may be named in one place of a file.

    Attributes:
        kind: of thing, for messages: ``"an optimizer"``.
        known: by name.
        folder: that of the file, where ``file.py`` is looked for first.
        read: what becomes of a table that names a file, or None where none can be named; it gives
            None for a table of another kind.
    """

    kind: str
    known: Mapping[str, Any]
    folder: Path
    read: Callable[[dict[str, Any], str, Names], Any] | None = None

    def make(self, value: Any, where: str) -> Any:
        """The object that a text or a table stands for; anything else as it is.

        A text without a colon that is not known stays a text.

        Args:
            value: what stands in the file.
            where: the key it stands under, for messages.
        """
        if isinstance(value, str):
            return self._named(value, where) if value in self.known or ":" in value else value
        if isinstance(value, list):
            return [self.make(item, f"{where}.{index}") for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if USE not in value:
            return {key: self.make(item, f"{where}.{key}") for key, item in value.items()}
        found = None if self.read is None else self.read(value, where, self)
        return self.call(self.find(value[USE], where), value, where) if found is None else found

    def call(self, found: Any, table: Mapping[str, Any], where: str) -> Any:
        """What a function or class makes of the arguments in a table."""
        name = str(table[USE])
        options = {k: self._argument(v, f"{where}.{k}") for k, v in table.items() if k != USE}
        if not callable(found):
            raise UsageError(
                f"{where}: {name} is a {type(found).__name__}, and takes no arguments."
            )
        positional = options.pop(ARGS, [])
        if not isinstance(positional, list):
            raise UsageError(f"{where}.{ARGS} is {positional!r}; expected a list.")
        if str(getattr(found, "__module__", "")).startswith("mlx."):
            self._refuse_names([positional, options], name, where)
        _check_arguments(found, name, positional, options, where)
        if inspect.isgeneratorfunction(found):
            return partial(found, *positional, **options)  # each epoch calls it anew
        return self._called(found, name, positional, options, where)

    def make_a(self, kind: type, given: Any, where: str, seed: int | None = None) -> Any:
        """The same for something that must be made: a function is called, too.

        Args:
            kind: what it must be.
            given: what stands in the file.
            where: the key it stands under, for messages.
            seed: of MLX's random key before the call, whatever importing has drawn.

        Raises:
            UsageError: what comes out is of another kind.
        """
        table = given if isinstance(given, Mapping) else {USE: given}
        if USE not in table:
            raise UsageError(f"{where}: there is no {USE} that says what it is.")
        found = self.find(table[USE], where)
        if seed is not None:
            mx.random.seed(seed)
        if not isinstance(found, kind) or len(table) > 1:
            found = self.call(found, table, where)
        if not isinstance(found, kind):
            raise UsageError(
                f"{where}: {table[USE]} gives a {type(found).__name__}; expected {self.kind}."
            )
        return found

    def find(self, name: Any, where: str) -> Any:
        """The class, function or object that a name stands for.

        Raises:
            UsageError: there is none.
        """
        if not isinstance(name, str):
            raise UsageError(f"{where}.{USE} is {name!r}; expected a name.")
        if name in self.known:
            return self.known[name]
        if ":" in name:
            return imported(name, where, self.folder)
        raise UsageError(
            f"{where}: {name!r} is no name of {self.kind}.{known(name, self.known)} Your own are "
            "written as 'package.module:name' or 'file.py:name'."
        )

    def _named(self, name: str, where: str) -> Any:
        """What this library knows is called, and a class; anything else is itself."""
        found = self.find(name, where)
        if name in self.known or inspect.isclass(found):
            return self.call(found, {USE: name}, where)
        return found

    def _argument(self, value: Any, where: str) -> Any:
        """An argument: tables with ``use`` and lists of them are made, texts stay texts.

        But ``file.py:name`` is what it names, as it is: a function that is handed on.
        """
        if isinstance(value, str) and OWN_NAME.fullmatch(value):
            return imported(value, where, self.folder)
        if isinstance(value, list):
            return [self._argument(item, f"{where}.{index}") for index, item in enumerate(value)]
        if isinstance(value, dict) and USE in value:
            return self.make(value, where)
        if isinstance(value, dict):
            return {key: self._argument(item, f"{where}.{key}") for key, item in value.items()}
        return value

    def _refuse_names(self, given: Any, name: str, where: str) -> None:
        """Raise for a text where MLX, which takes no names, wants what it stands for."""
        for _, text in leaves(given):
            if isinstance(text, str) and text in self.known:
                raise UsageError(
                    f"{where}: {name} is given the text {text!r}, and MLX takes no names. What it "
                    f"stands for is written {{ use = {text!r} }}."
                )

    def _called(
        self,
        found: Callable[..., Any],
        name: str,
        positional: list[Any],
        options: dict[str, Any],
        where: str,
    ) -> Any:
        try:
            with own_code():
                return found(*positional, **options)
        except ConfigurationError as error:
            raise UsageError(f"{where}: {error}") from error
        except RunFailedError as error:
            if name in self.known and isinstance(error.__cause__, (TypeError, ValueError)):
                raise UsageError(f"{where}: {name}: {error.__cause__}") from error.__cause__
            raise


def _check_arguments(
    function: Callable[..., Any],
    name: str,
    positional: list[Any],
    options: Mapping[str, Any],
    where: str,
) -> None:
    """Raise for arguments that are unknown or missing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in
        return
    parameters = signature.parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for key in options:
            if key not in parameters:
                raise UsageError(
                    f"{where}: {name} has no argument {key!r}.{known(key, parameters)}"
                )
    try:
        signature.bind(*positional, **options)
    except TypeError as error:
        raise UsageError(f"{where}: {name}: {error}.") from error


def imported(name: str, where: str, folder: Path) -> Any:
    """What ``package.module:name`` or ``file.py:name`` stands for.

    Args:
        name: with dots after the colon for attributes of attributes.
        where: the key it stands under, for messages.
        folder: where a file is looked for, before the folder in which the command runs.

    Raises:
        UsageError: there is no such module, file or name.
        RunFailedError: the module raises when it is imported.
    """
    source, _, attributes = name.rpartition(":")
    if not source or not attributes:
        raise UsageError(f"{where}: {name!r}; expected 'package.module:name' or 'file.py:name'.")
    if source.endswith(".py"):
        found: Any = _of_file(find_file(source, where, folder))
    else:
        found = _of_module(source, where)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = nearest(attribute, [n for n in dir(found) if not n.startswith("_")])
            raise UsageError(f"{where}: {source} has no {attribute!r}.{near}")
        found = getattr(found, attribute)
    return found


def find_file(name: str, where: str, folder: Path) -> Path:
    """A file beside the settings, or in the folder in which the command runs.

    Raises:
        UsageError: it is in neither.
    """
    path = Path(name).expanduser()
    places = [folder / path, Path.cwd() / path]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise UsageError(
        f"{where}: there is no file {' or '.join(dict.fromkeys(map(str, places)))}."
        f"{nearest(path.name, [p.name for p in places[0].parent.glob('*')])}"
    )


def _of_file(path: Path) -> ModuleType:
    """A file as a module, whose neighbours it can import."""
    _reachable(path.parent)
    # By its own name if that is free, so that the processes of a loader find it, too.
    for name in (path.stem, f"{path.stem}_{abs(hash(path)):x}"):
        present = sys.modules.get(name)
        if present is not None and getattr(present, "__file__", None) == str(path):
            return present
        if present is None:
            break
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickles look there
    try:
        with own_code():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _of_module(name: str, where: str) -> ModuleType:
    _reachable(Path.cwd())
    try:
        with own_code():
            return importlib.import_module(name)
    except RunFailedError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and name.startswith(str(cause.name)):
            raise UsageError(f"{where}: there is no module {name!r}: {cause}.") from cause
        raise


def _reachable(folder: Path) -> None:
    """Put a folder first on the path of imports, as ``python file.py`` does."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
