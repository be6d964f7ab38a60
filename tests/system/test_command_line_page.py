"""docs/command-line.md: its commands exist, and its file of settings can be read."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mlx_fit.cli import VERBS, _parser
from mlx_fit.cli.train_config import TABLES, read_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


def test_each_verb_has_its_line():
    assert {words[1] for words in COMMANDS} == set(VERBS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_line_is_understood(words):
    assert words[0] == "mlx-fit"
    arguments, unknown = _parser()[0].parse_known_args(words[1:])
    assert arguments.verb == words[1]
    assert not unknown


def test_its_settings_are_those_of_the_example(tmp_path):
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "page.toml").write_text(text)
    shown = read_config(tmp_path / "page.toml", [])
    example = tomllib.loads((ROOT / "examples" / "digits.toml").read_text())
    assert is_part(shown, example)


def is_part(small, large):
    if not isinstance(small, dict):
        return small == large
    return all(key in large and is_part(value, large[key]) for key, value in small.items())


def test_it_explains_every_table():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(TABLES)


def test_the_commands_of_the_settings_can_be_read():
    for words in COMMANDS:
        if words[1] == "train":
            changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            assert read_config(ROOT / words[2], changes)
