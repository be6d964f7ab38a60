"""The file of ``mlx-fit train``: its tables, and keys that the command line sets."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_fit.checks import natural
from mlx_fit.cli.objects import USE
from mlx_fit.cli.settings import UsageError, checking_usage, known, read_toml
from mlx_fit.distributed.trainer import DistributedTrainer
from mlx_fit.timing import Schedule
from mlx_fit.trainer import Trainer

TABLES = ("model", "optimizer", "loss", "metrics", "objective", "data", "fit", "callbacks")
PARTS = ("train", "validation", "test")


def _keywords(function: Any, *without: str) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return tuple(name for name in names if name not in without)


OF_RANKS = _keywords(DistributedTrainer.__init__)
OF_TRAINER = (*_keywords(Trainer.__init__, "objective"), *OF_RANKS)
OF_FIT = _keywords(Trainer.fit, "callbacks")
OF_SCHEDULE = tuple(inspect.signature(Schedule).parameters)


def read_config(path: Path, changes: Iterable[str]) -> dict[str, Any]:
    """The tables of a file, with keys that ``--set`` changes, checked as far as names go.

    Args:
        path: the TOML file.
        changes: ``"table.key=value"``, the value as in TOML, or a text without quotes;
            ``"table.key="`` leaves a key out.

    Raises:
        UsageError: it cannot be read, or a name in it is unknown.
    """
    with checking_usage():
        config = read_toml(path)
        for change in changes:
            _set(config, change)
        _check(config, str(path))
    return config


def _set(config: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UsageError(f"--set {change}: expected KEY=VALUE, such as fit.epochs=3.")
    place: Any = config
    for part, following in pairwise(parts):
        index = _index(place, part, change)
        inner = place[index] if isinstance(place, list) else place.get(index, {})
        if isinstance(inner, str) and not following.isdigit():
            inner = {USE: inner}  # a name that gets arguments
        elif inner is True:
            inner = {}
        elif not isinstance(inner, (dict, list)):
            raise UsageError(f"--set {change}: {part} is {inner!r}, which has no keys.")
        place[index] = inner
        place = inner
    index = _index(place, parts[-1], change)
    if text.strip():
        place[index] = _value(text.strip())
    elif isinstance(place, list) or index in place:
        del place[index]
    else:
        near = known(index, place)
        raise UsageError(f"--set {change}: there is no {key.strip()} to leave out.{near}")


def _index(place: Any, part: str, change: str) -> Any:
    """The key of a table, or the place in a list."""
    if not isinstance(place, list):
        return part
    if not part.isdigit() or int(part) >= len(place):
        raise UsageError(
            f"--set {change}: {part} is no place in a list of {len(place)}, counted from 0."
        )
    return int(part)


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if found.keys() == {"value"} else text


def _check(config: Mapping[str, Any], name: str) -> None:
    _known(config, TABLES, name)
    for key in ("model", "optimizer", "data"):
        if not config.get(key):
            raise UsageError(f"{name}: there is no {key}. {_EXAMPLES[key]}")
    if isinstance(config["data"], Mapping) and USE not in config["data"]:
        _known(config["data"], PARTS, f"{name}: data")
    if ("loss" in config) == ("objective" in config):
        number = "both" if "loss" in config else "neither"
        raise UsageError(
            f'{name}: expected a loss, as loss = "mse", or an objective; has {number}.'
        )
    if "metrics" in config and "objective" in config:
        raise UsageError(f"{name}: metrics belong to a loss; an objective logs its own.")
    for key in ("fit", "callbacks"):
        is_kind = isinstance(
            config.get(key, {}), (Mapping, list) if key == "callbacks" else Mapping
        )
        if not is_kind:
            raise UsageError(f"{name}: {key} is {config[key]!r}; expected a table.")
    given = config.get("fit", {})
    _known(given, (*OF_FIT, *OF_TRAINER), f"{name}: fit")
    Schedule(**{key: given[key] for key in OF_SCHEDULE if key in given})
    if "seed" in given:
        natural("fit.seed", given["seed"])


def _known(table: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in names:
            raise UsageError(f"{where}: there is no setting {key!r}.{known(key, names)}")


_EXAMPLES = {
    "model": "Write [model], use = 'net.py:Net', and its arguments below.",
    "optimizer": "Write [optimizer], use = 'AdamW', learning_rate = 1e-3.",
    "data": "Write [data], train = 'digits', a .npz or .csv file, or 'file.py:function'.",
}
