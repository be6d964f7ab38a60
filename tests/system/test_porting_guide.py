"""The program in docs/porting.md runs as it stands, and the pairs it names are there."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_fit.interop.torch
from mlx_fit import schedules

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


@pytest.mark.parametrize(
    ("prefix", "home"),
    [("mx", mx), ("nn", nn), ("optim", optim), ("schedules", schedules), ("interop", mlx_fit)],
)
def test_the_names_of_the_tables_exist(prefix, home):
    table = GUIDE.read_text().partition("## Names")[2].partition("\n## ")[0]
    rows = [line.split("|")[4:6] for line in table.splitlines() if line.startswith("| ")]
    cells = " ".join(cell for row in rows for cell in row)
    names = re.findall(rf"`{prefix}\.([A-Za-z_0-9.]+)", cells)
    assert names
    for name in names:
        assert operator.attrgetter(f"interop.{name}" if prefix == "interop" else name)(home)
