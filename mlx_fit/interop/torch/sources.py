"""Where weights come from: a ``state_dict``, a torch module, or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.interop.torch.tensors import is_tensor, require_torch, to_array

Rename = Mapping[str, str | None] | Callable[[str], str | None] | None

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
# What wraps a state_dict in a training checkpoint, and prefixes that wrappers put before all names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_state(source: Any) -> dict[str, mx.array]:
    """The arrays of ``source`` by their torch names. Tensors that share memory share the array.

    Args:
        source: a mapping of names to tensors or arrays, a ``torch.nn.Module``, or the path of a
            ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    Raises:
        ConfigurationError: ``source`` is none of these.
        DataError: the file cannot be read, or holds something that is no tensor.
    """
    if isinstance(source, (str, Path)):
        source = _read_file(Path(source))
    elif callable(getattr(source, "state_dict", None)):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ConfigurationError(
            f"source is a {type(source).__name__}; expected a state_dict, a torch module, or the "
            f"path of a .safetensors or {', '.join(TORCH_FILES)} file."
        )
    return _without_prefix(_arrays(_unwrapped(source)))


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is no file; give the path of the weights.", path=path)
    if path.suffix == ".safetensors":
        try:
            return mx.load(str(path))
        except RuntimeError as error:
            raise DataError(f"is no whole safetensors file: {error}", path=path) from error
    if path.suffix not in TORCH_FILES:
        raise ConfigurationError(
            f"source {str(path)!r} ends in {path.suffix!r}; expected .safetensors or one of "
            f"{', '.join(TORCH_FILES)}."
        )
    torch = require_torch(f"Reading {path.name}")
    try:
        # Never anything but tensors and plain values: a pickle could run any code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            "torch.load(weights_only=True) cannot read this file, and nothing else is tried: "
            f"{(str(error) or type(error).__name__).splitlines()[0]} Save model.state_dict() "
            "alone, best as .safetensors.",
            path=path,
        ) from error


def _unwrapped(source: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _WRAPPERS:
        if isinstance(source.get(key), Mapping):
            return source[key]
    return source


def _arrays(source: Mapping[str, Any]) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    known: dict[Any, mx.array] = {}
    for name, value in source.items():
        if not isinstance(name, str):
            raise DataError(f"source has the key {name!r}; expected names of tensors.")
        if name.endswith("_extra_state"):
            continue
        key = _identity(value)
        if key not in known:
            known[key] = to_array(value, f"source[{name!r}]")
        found[name] = known[key]
    return found


def _identity(value: Any) -> Any:
    if is_tensor(value) and not hasattr(value, "materialize") and value.numel():
        return value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)
    return id(value)


def _without_prefix(state: dict[str, mx.array]) -> dict[str, mx.array]:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def renamed(names: Any, rename: Rename) -> dict[str, str]:
    """New name -> old name, for the names that ``rename`` keeps.

    Args:
        names: torch names.
        rename: None; a function of a name; or a table of whole names or dotted beginnings, where
            the longest that fits counts and ``""`` is the beginning of all. None drops a name.

    Raises:
        ConfigurationError: two names become one, or an entry of the table fits no name.
    """
    names = list(names)
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        table = dict(rename)
        if unused := [key for key in table if not any(_begins(name, key) for name in names)]:
            raise ConfigurationError(
                f"rename names {unused}, with which no name of the weights begins. They are: "
                f"{_some(names)}."
            )
        rename = lambda name: _by_table(name, table)  # noqa: E731
    elif not callable(rename):
        raise ConfigurationError(
            f"rename is a {type(rename).__name__}; expected a dict from torch names to this "
            "model's, or a function of a name."
        )
    result: dict[str, str] = {}
    for name in names:
        new = rename(name)
        if new is None:
            continue
        if not isinstance(new, str):
            raise ConfigurationError(f"rename gives {new!r} for {name!r}; expected a name or None.")
        if new in result:
            raise ConfigurationError(f"rename gives {new!r} for both {result[new]!r} and {name!r}.")
        result[new] = name
    return result


def _begins(name: str, key: str) -> bool:
    return not key or name == key or name.startswith(key + ".")


def _by_table(name: str, table: Mapping[str, str | None]) -> str | None:
    fitting = [key for key in table if _begins(name, key)]
    if not fitting:
        return name
    key = max(fitting, key=len)
    new = table[key]
    if new is None:
        return None
    rest = name[len(key) :].removeprefix(".")
    return ".".join(part for part in (new, rest) if part)


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
