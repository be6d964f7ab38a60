"""The program in docs/porting.md runs as it stands, and the pairs it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "porting.md"


def test_the_program_of_the_porting_guide_runs(capsys):
    pytest.importorskip("torch")
    programs = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(programs) == 1
    exec(compile(programs[0], str(GUIDE), "exec"), {})
    assert "layers.2.weight" in capsys.readouterr().out


def test_the_folders_that_the_porting_guide_links_to_exist():
    links = re.findall(r"\]\((\.\./[^)]*)\)", GUIDE.read_text())
    assert links
    assert all((GUIDE.parent / link).exists() for link in links)
