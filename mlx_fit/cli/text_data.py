"""The rows of ``--data``: a folder with files by name, or one file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mlx_fit.cli.settings import nearest
from mlx_fit.errors import ConfigurationError
from mlx_fit.text import PreferenceDataset, TextDataset
from mlx_fit.text.preference import ANSWERS

Rows = TextDataset | PreferenceDataset

SUFFIXES = (".jsonl", ".txt")
FILES = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}


def find_file(data: str, part: str) -> Path | None:
    """The file of a part (``train``, ``valid``, ``test``) in the folder ``data``."""
    folder = Path(data).expanduser()
    for name in FILES[part]:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    return None


def check_data(data: str) -> Path:
    """The path of ``--data``.

    Raises:
        ConfigurationError: there is nothing, or a folder without the rows to train on.
    """
    path = Path(data).expanduser()
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.glob("*")])
        raise ConfigurationError(f"--data {data}: there is no such file or folder.{near}")
    return path


def read_part(
    settings: argparse.Namespace, tokenizer: Any, part: str, pairs: bool = False
) -> Rows | None:
    """A part of the folder ``--data``, or all rows of the file ``--data``; None if it has none.

    Args:
        settings: with those of the text.
        tokenizer: the model's.
        part: ``"train"``, ``"valid"`` or ``"test"``.
        pairs: whether the rows are a prompt with a chosen and a rejected answer.

    Raises:
        ConfigurationError: the first row is of the other kind.
    """
    path = check_data(settings.data)
    found = find_file(settings.data, part) if path.is_dir() else path
    if found is None:
        return None
    _check_kind(found, settings.format, pairs)
    if pairs:
        return PreferenceDataset(
            found,
            tokenizer,
            max_length=settings.max_length,
            truncation=settings.truncation,
            on_error=settings.on_error,
        )
    return TextDataset(
        found,
        tokenizer,
        format=settings.format,
        train_on=settings.train_on,
        max_length=settings.max_length,
        truncation=settings.truncation,
        on_error=settings.on_error,
        use_chat_template=settings.use_chat_template,
    )


def has_pairs(settings: argparse.Namespace) -> bool:
    """Whether the first row of the part ``--split`` is a pair of answers."""
    path = check_data(settings.data)
    found = find_file(settings.data, settings.split) if path.is_dir() else path
    row = None if found is None else _first_row(found)
    return row is not None and all(name in row for name in ANSWERS)


def _check_kind(path: Path, format: str, pairs: bool) -> None:
    """Tell preferences from other rows by the first of them."""
    row = _first_row(path)
    if row is None:
        return
    is_pair = all(name in row for name in ANSWERS)
    if is_pair and not pairs and format == "auto":
        raise ConfigurationError(
            f"{path}: its rows have 'chosen' and 'rejected', so they are preferences: "
            "mlx-fit finetune --objective dpo (or orpo) learns from them. Nothing is done here."
        )
    if pairs and not is_pair:
        fields = ", ".join(map(str, row)) or "no fields"
        raise ConfigurationError(
            f"{path}: its rows have {fields}; --objective dpo and orpo need 'prompt', 'chosen' and "
            "'rejected'. Without --objective the rows are learned as they are."
        )


def _first_row(path: Path) -> dict[str, Any] | None:
    """The first row of a file as far as it can be read: what is wrong with it is told later."""
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def require_part(
    settings: argparse.Namespace, tokenizer: Any, part: str, pairs: bool = False
) -> Rows:
    """The same, of a part that must be there.

    Raises:
        ConfigurationError: it is not.
    """
    rows = read_part(settings, tokenizer, part, pairs)
    if rows is None:
        have = ", ".join(sorted(p.name for p in Path(settings.data).expanduser().iterdir())[:8])
        raise ConfigurationError(
            f"--data {settings.data} has no {part}.jsonl (have: {have or 'nothing'})."
        )
    return rows


def train_and_valid(
    settings: argparse.Namespace, tokenizer: Any, pairs: bool = False
) -> tuple[Any, Any, Rows]:
    """Rows to train on, rows to validate on (None: there are none), and the data set of both.

    Of one file the last ``--validation-split`` of the rows are for validation.
    """
    rows = require_part(settings, tokenizer, "train", pairs)
    if check_data(settings.data).is_dir():
        return rows, read_part(settings, tokenizer, "valid", pairs), rows
    held_out = int(len(rows) * settings.validation_split)
    if settings.validation_split and not held_out and len(rows) > 1:
        held_out = 1
    if not held_out:
        return rows, None, rows
    cut = len(rows) - held_out
    if isinstance(rows, PreferenceDataset):
        return rows.between(0, cut), rows.between(cut, len(rows)), rows
    items = list(rows)
    return items[:cut], items[cut:], rows
