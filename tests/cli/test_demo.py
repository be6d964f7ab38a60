"""``mlx-fit demo`` as a newcomer runs it."""

import re

import pytest

from mlx_fit.cli import main


def test_the_demo_learns_and_says_where_its_files_are(tmp_path, capsys):
    assert main(["demo", "--epochs", "8", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    accuracy = float(re.search(r"held-out accuracy\W+([\d.]+)", out)[1])
    assert accuracy >= 0.97
    assert (tmp_path / "best.safetensors").is_file()
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 9
    assert list((tmp_path / "tensorboard" / "validation").glob("events*"))
    assert "mlx-fit doctor" in out


def test_no_epochs_are_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--epochs", "0"])
    assert "expected at least 1" in capsys.readouterr().err
