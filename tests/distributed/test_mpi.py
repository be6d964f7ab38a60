"""The same training over Open MPI, where there is one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_fit

ROOT = Path(mlx_fit.__file__).parent.parent
RANK = ROOT / "tests" / "soak_rank.py"
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun here")


def run(command, folder, **environment):
    """What the two ranks wrote."""
    folder.mkdir()
    command = [*command, sys.executable, str(RANK), str(folder), "none", "0", "0"]
    done = subprocess.run(
        ["env", *[f"{k}={v}" for k, v in environment.items()], *command],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@needs_mpi
def test_open_mpi_gives_the_bits_of_the_ring(tmp_path):
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    library = {"MLX_MPI_LIBNAME": "libmpi.so.40"}
    launch = [sys.executable, "-m", "mlx_fit.cli", "launch", "-n", "2"]
    ring = run([*launch, "--"], tmp_path / "ring")
    mpi = run([*launch, "--backend", "mpi", "--"], tmp_path / "mpi", **root, **library)
    mpirun = ["mpirun", "--oversubscribe", "-n", "2"]
    plain = run(mpirun, tmp_path / "mpirun", **root, **library)
    assert ring == mpi == plain
    assert ring[0] == ring[1]
