"""The rows of ``--data``: a folder with files by name, or one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_fit.cli.settings import nearest
from mlx_fit.errors import ConfigurationError
from mlx_fit.text import TextDataset

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


def read_part(settings: argparse.Namespace, tokenizer: Any, part: str) -> TextDataset | None:
    """A part of the folder ``--data``, or all rows of the file ``--data``; None if it has none."""
    path = check_data(settings.data)
    found = find_file(settings.data, part) if path.is_dir() else path
    if found is None:
        return None
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


def require_part(settings: argparse.Namespace, tokenizer: Any, part: str) -> TextDataset:
    """The same, of a part that must be there.

    Raises:
        ConfigurationError: it is not.
    """
    rows = read_part(settings, tokenizer, part)
    if rows is None:
        have = ", ".join(sorted(p.name for p in Path(settings.data).expanduser().iterdir())[:8])
        raise ConfigurationError(
            f"--data {settings.data} has no {part}.jsonl (have: {have or 'nothing'})."
        )
    return rows


def train_and_valid(settings: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, TextDataset]:
    """Rows to train on, rows to validate on (None: there are none), and the data set of both.

    Of one file the last ``--validation-split`` of the rows are for validation.
    """
    rows = require_part(settings, tokenizer, "train")
    if check_data(settings.data).is_dir():
        return rows, read_part(settings, tokenizer, "valid"), rows
    held_out = int(len(rows) * settings.validation_split)
    if settings.validation_split and not held_out and len(rows) > 1:
        held_out = 1
    if not held_out:
        return rows, None, rows
    items = list(rows)
    return items[: len(rows) - held_out], items[len(rows) - held_out :], rows
