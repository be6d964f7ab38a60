"""`mlx-fit doctor`: what it shows, what it finds broken, and what it fixes."""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mlx_fit.cli import doctor
from mlx_fit.runtime import blas

ROOT = Path(doctor.__file__).parents[2]


def call(*options, python=sys.executable, **variables):
    """The command in a process of its own, piped."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_FIT_BLAS": "", **variables}
    environment.pop("COLUMNS", None)
    command = [python, "-m", "mlx_fit.cli", "doctor", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def arguments(*options):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def facts(monkeypatch):
    """The report of a machine where all is well, to be spoilt."""
    monkeypatch.delenv("MLX_FIT_BLAS", raising=False)
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "replaced_name", lambda: "liblapack.so")
    loaded = blas.Status("/cache/openblas.so", "scipy-openblas32", "import")
    return {
        "versions": dict.fromkeys(("mlx_fit", "mlx", "numpy", "python", "system"), "1.0"),
        "memory": dict.fromkeys(("limit", "mlx_limit", "active", "cache", "process_rss"), 0),
        "devices": ["cpu (x)"],
        "default_device": "cpu",
        "blas": vars(loaded) | {"pth": "/site-packages/mlx_fit_blas.pth"},
        "gflops": {"cpu": {"gflops": 100.0, "error": 1e-7}, "gpu": {"gflops": 1e4, "error": 1e-4}},
        "compiler": "/usr/bin/g++ 12",
        "compile_error": None,
        "compile_cache": {"path": "/tmp/mlx", "num_files": 1, "bytes": 10},
    }


def test_the_report_fits_80_columns_when_piped_and_names_everything():
    done = call()
    assert done.returncode == 0, done.stderr
    titles = ("Versions", "Devices", "BLAS", "Product", "Compiler", "Memory", "Compile cache")
    assert [title for title in titles if title not in done.stdout] == []
    lines = [line for line in done.stdout.splitlines() if not line.startswith("    ")]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout


def test_json_is_the_same_report_for_programs():
    done = call("--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0
    assert facts["gflops"]["cpu"]["gflops"] > 0.1
    assert facts["gflops"]["cpu"]["error"] < 1e-5
    assert facts["memory"]["limit_bytes"] > 1 << 20
    assert (facts["broken"], facts["compile_error"]) == ([], None)


def test_a_named_library_that_cannot_be_loaded_is_an_error():
    if not sys.platform.startswith("linux"):
        pytest.skip("MLX_FIT_BLAS is read on Linux only")
    done = call(MLX_FIT_BLAS="/nowhere/libblas.so")
    assert done.returncode == 1
    assert "MLX_FIT_BLAS=/nowhere/libblas.so" in done.stdout
    assert "    unset MLX_FIT_BLAS" in done.stdout.splitlines()


def test_no_compiler_is_told_with_the_command(tmp_path):
    done = call("--json", PATH=str(tmp_path))
    advice = json.loads(done.stdout)["advice"]
    assert any("silently runs eagerly" in finding["text"] for finding in advice)
    assert any("g++" in finding["command"] or "xcode" in finding["command"] for finding in advice)


def test_nothing_is_found_where_all_is_well(facts):
    assert doctor._broken(facts) == []
    assert doctor._advice(facts) == []


@pytest.mark.parametrize(
    ("key", "value", "command"),
    [
        ("gflops", {"cpu": {"gflops": 9.0, "error": 0.5}}, "export MLX_FIT_BLAS=off"),
        ("gflops", {"gpu": {"gflops": 9.0, "error": float("nan")}}, "pip install -U mlx"),
        ("compile_error", "no header", "export MLX_DISABLE_COMPILE=1"),
        ("blas", {"failed": True, "reason": "disk full"}, blas.INSTALL_COMMAND),
    ],
)
def test_what_is_broken_comes_with_a_command(facts, key, value, command):
    facts[key] = value
    assert [finding["command"] for finding in doctor._broken(facts)] == [command]


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"pth": None}, blas.FIX_COMMAND),
        ({"library": None, "reason": "none found"}, blas.INSTALL_COMMAND),
        ({"reason": "Each start makes a copy"}, "export XDG_CACHE_HOME=/a/folder/of/yours"),
    ],
)
def test_a_blas_that_could_be_better_comes_with_a_command(facts, changes, command):
    facts["blas"] |= changes
    assert [finding["command"] for finding in doctor._advice(facts)] == [command]


def test_what_is_switched_off_is_told(facts, monkeypatch):
    facts["blas"]["library"] = None
    monkeypatch.setenv("MLX_FIT_BLAS", "off")
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    commands = [finding["command"] for finding in doctor._advice(facts)]
    assert commands == ["unset MLX_FIT_BLAS", "unset MLX_DISABLE_COMPILE"]


def test_force_without_fix_blas_is_wrong_usage(capsys):
    assert doctor.run(arguments("--force")) == 2
    assert "--force goes with --fix-blas only" in capsys.readouterr().err


def test_there_is_nothing_to_fix_without_the_reference_blas(capsys, monkeypatch):
    monkeypatch.setattr(blas, "replaced_name", lambda: None)
    assert doctor.run(arguments("--fix-blas")) == 0
    assert "Nothing to fix" in capsys.readouterr().out


def test_outside_a_virtual_environment_the_fix_is_refused_in_one_line(capsys, facts, monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert doctor.run(arguments("--fix-blas")) == 1
    assert "is not a virtual environment" in capsys.readouterr().err


@pytest.mark.skipif(
    not blas._is_obtainable(), reason=f"needs an OpenBLAS and patchelf: {blas.INSTALL_COMMAND}"
)
def test_the_fix_says_what_it_wrote_and_can_be_undone(tmp_path):
    venv.create(tmp_path, symlinks=True, with_pip=False)
    site = next((tmp_path / "lib").glob("python*")) / "site-packages"
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
    settings = {
        "python": str(tmp_path / "bin" / "python"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    fixed = call("--fix-blas", **settings)
    assert fixed.returncode == 0, fixed.stderr
    assert f"Wrote {site / 'mlx_fit_blas.pth'}" in fixed.stdout
    assert "now load" in fixed.stdout
    undone = call("--unfix-blas", **settings)
    assert f"Removed {site / 'mlx_fit_blas.pth'}" in undone.stdout
    assert not list(site.glob("*mlx_fit_blas*"))
