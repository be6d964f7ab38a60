"""The soak in reduced form: ``make soak`` runs the whole of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "soak.py"


def soak(*arguments):
    command = [sys.executable, str(SOAK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_run_killed_at_every_stage_of_a_save_and_at_random_ends_with_the_same_bits():
    done = soak("--stages", "45", "--kills", "30")
    assert done.stdout.splitlines()[-1].endswith("0 differences"), done.stdout + done.stderr
    kills = int(done.stdout.splitlines()[-1].split()[0])
    assert kills >= 2 * 45 + 30
    assert done.returncode == 0


def test_real_processes_that_are_killed_go_on_as_well():
    done = soak("--fresh", "--kills", "3", "--seed", "1")
    assert done.stdout.splitlines()[-1].endswith("0 differences"), done.stdout + done.stderr


@pytest.mark.parametrize("part", ["random_key", "optimizer", "position", "callbacks"])
def test_the_soak_notices_an_ingredient_that_is_left_out(part):
    """Killed where a checkpoint is there; at random moments of a busy machine there may be none."""
    stages = "--first-stage", "40", "--stages", "41", "--kills", "0"
    done = soak(*stages, "--leave-out", part)
    assert done.returncode == 1
    assert not done.stdout.splitlines()[-1].endswith(" 0 differences")
