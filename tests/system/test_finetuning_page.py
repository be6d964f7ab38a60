"""docs/finetuning.md: every option of its commands stands there as --help says it, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_fit.cli import _parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetuning.md").read_text()
VERBS = ["finetune", "evaluate", "generate", "fuse"]
PARSERS = _parser()[1]


def options(verb):
    return [a for a in PARSERS[verb]._actions if a.option_strings[0] not in ("-h", "--debug")]


def row(action):
    """The line of a table for an option."""
    takes = action.metavar if action.metavar and action.nargs != 0 else ""
    if action.choices:
        takes = " ".join(action.choices)
    flag = " ".join(filter(None, [action.option_strings[0], takes]))
    return f"| `{flag}` | {action.help.replace('%%', '%')} |"


def table(verb):
    """The lines below the heading of a verb."""
    section = PAGE.partition(f"\n### mlx-fit {verb}\n")[2].split("\n#")[0]
    return [line for line in section.splitlines() if line.startswith("| `--")]


def shared(verb):
    """Lines that stand in the table of finetune already."""
    return {row(a) for a in options("finetune")} if verb != "finetune" else set()


@pytest.mark.parametrize("verb", VERBS)
def test_each_option_has_its_line(verb):
    assert table(verb) == [row(a) for a in options(verb) if row(a) not in shared(verb)]


@pytest.mark.parametrize("verb", VERBS[1:])
def test_options_that_finetune_has_too_are_named(verb):
    section = PAGE.partition(f"\n### mlx-fit {verb}\n")[2].split("\n#")[0]
    sentence = section.partition("As above: ")[2].partition(".\n")[0]
    expected = [a.option_strings[0] for a in options(verb) if row(a) in shared(verb)]
    assert re.findall(r"`(--[\w-]+)`", sentence) == expected


def test_no_option_is_named_that_does_not_exist():
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE))
    known = {
        flag for parser in PARSERS.values() for a in parser._actions for flag in a.option_strings
    }
    assert named <= known
