"""Settings of a command: flags of the command line that are keys of a TOML file as well."""

from __future__ import annotations

import argparse
import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fit.errors import ConfigurationError


class UsageError(ConfigurationError):
    """What was typed, or stands in a file of settings, cannot be done: exit code 2."""


@contextmanager
def checking_usage() -> Iterator[None]:
    """Inside, settings are read: what is wrong with them is wrong usage."""
    try:
        yield
    except ConfigurationError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: with underscores; the flag has dashes.
        kind: ``str``, ``int``, ``float``, ``bool``, ``list`` (of texts) or ``dict`` (in files
            alone).
        default: where neither flag nor file says anything.
        help: for ``--help``.
        least: of a number, which may be it. above, below: limits that it may not be.
        choices: of a text.
    """

    name: str
    kind: type
    default: Any
    help: str
    least: float | None = None
    choices: tuple[str, ...] | None = None
    above: float | None = None
    below: float | None = None

    def checked(self, value: Any, source: str) -> Any:
        """``value`` as this setting's kind.

        Raises:
            ConfigurationError: it is of another kind, too small, or none of the choices.
        """
        if value is None:
            return None
        if self.kind is list and isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if self.kind is float and type(value) is int:
            value = float(value)
        is_kind = type(value) is self.kind
        if self.kind is list and is_kind:
            is_kind = all(isinstance(part, str) for part in value)
        if not is_kind:
            raise ConfigurationError(f"{source} is {value!r}; expected {_KINDS[self.kind]}.")
        if self.choices and value not in self.choices:
            raise ConfigurationError(
                f"{source} is {value!r}; expected one of {', '.join(self.choices)}."
                f"{nearest(str(value), self.choices)}"
            )
        if self.kind is float and not math.isfinite(value):
            raise ConfigurationError(f"{source} is {value!r}; expected a finite number.")
        if self.least is not None and not self.least <= value:
            raise ConfigurationError(
                f"{source} is {value!r}; expected a number of at least {self.least:g}."
            )
        for limit, word in ((self.above, "above"), (self.below, "below")):
            if limit is not None and not (value > limit if word == "above" else value < limit):
                raise ConfigurationError(
                    f"{source} is {value!r}; expected a number {word} {limit:g}."
                )
        return value


_KINDS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
    dict: "a table",
}


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """A flag for each setting; one that is not given is not among the arguments."""
    for setting in settings:
        flag = f"--{setting.name.replace('_', '-')}"
        # The line of --help says the default; argparse must not fill it in: files come between.
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(setting)}
        if setting.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif setting.kind is not dict:
            kind = {int: int, float: float}.get(setting.kind, str)
            metavar = {int: "N", float: "X", list: "A,B"}.get(setting.kind, "TEXT")
            if setting.choices:
                options["choices"] = setting.choices
            else:
                options["metavar"] = metavar
            parser.add_argument(flag, type=kind, **options)


def _help(setting: Setting) -> str:
    said = setting.default not in (None, False, ()) and setting.kind is not dict
    text = f"{setting.help} (default {setting.default})" if said else setting.help
    return text.replace("%", "%%")


def resolve(
    arguments: argparse.Namespace, settings: Iterable[Setting], file: Mapping[str, Any], name: str
) -> tuple[argparse.Namespace, set[str]]:
    """Values of all settings, and the names of those that were given: flags win over the file.

    Args:
        arguments: of the command line.
        settings: the table.
        file: keys and values of a configuration file, dashes or underscores in keys.
        name: of the file, for messages.

    Raises:
        ConfigurationError: a key is no setting, or a value is of another kind.
    """
    table = {setting.name: setting for setting in settings}
    values = {setting.name: setting.default for setting in table.values()}
    given: set[str] = set()
    for key, value in file.items():
        found = table.get(key.replace("-", "_"))
        if found is None:
            raise ConfigurationError(
                f"{name}: there is no setting {key!r}.{nearest(key.replace('-', '_'), table)}"
            )
        values[found.name] = found.checked(value, f"{name}: {key}")
        given.add(found.name)
    for key, value in vars(arguments).items():
        if key in table:
            values[key] = table[key].checked(value, f"--{key.replace('_', '-')}")
            given.add(key)
    return argparse.Namespace(**values), given


def read_toml(path: Path) -> dict[str, Any]:
    """Keys and values of a TOML file.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML: {error}") from error


def toml_text(values: Mapping[str, Any]) -> str:
    """Settings as a TOML file; those that are None are left out."""
    return "".join(f"{k} = {_toml(v)}\n" for k, v in values.items() if v is not None)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) + '"'


def known(word: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or all that there are."""
    listed = list(names)
    return nearest(word, listed) or f" Known are {', '.join(listed) or 'none'}."


def nearest(word: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing."""
    close = difflib.get_close_matches(word, list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
