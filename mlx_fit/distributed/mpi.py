"""Ranks that MPI's own ``mpirun`` starts."""

from __future__ import annotations

import ctypes.util
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from mlx_fit.distributed.backends import STARTING_PORT, Surroundings, free_ports
from mlx_fit.distributed.environment import CONTROL, Address
from mlx_fit.distributed.hosts import LOOPBACK, Host
from mlx_fit.distributed.processes import LocalRank, start_here
from mlx_fit.errors import ConfigurationError


def start_mpi(
    command: Sequence[str], hosts: Sequence[Host], variables: Mapping[str, str], shell: str
) -> LocalRank:
    """Start ``mpirun``, which starts the ranks; it counts as one process, rank 0.

    Raises:
        ConfigurationError: there is no ``mpirun``.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise ConfigurationError(
            "backend='mpi' needs mpirun on the PATH (on Debian, apt install openmpi-bin). The ring "
            "needs nothing."
        )
    is_here = all(host.is_here for host in hosts)
    ip, port = (LOOPBACK, free_ports(1)[0]) if is_here else (hosts[0].ip, STARTING_PORT)
    exported = {**variables, CONTROL: str(Address(ip, port))}
    if "MLX_MPI_LIBNAME" not in os.environ and (library := ctypes.util.find_library("mpi")):
        exported["MLX_MPI_LIBNAME"] = library  # Debian's runtime has no libmpi.so
    line = [mpirun, "-n", str(len(hosts))]
    if is_here:
        line += ["--oversubscribe"]
    else:
        places = Counter(host.name for host in hosts)
        line += ["--host", ",".join(f"{name}:{slots}" for name, slots in places.items())]
        line += ["--mca", "plm_rsh_agent", shell]
    for name, value in exported.items():
        line += ["-x", f"{name}={value}"]
    return start_here(0, [*line, "--", *command], {}, Surroundings())
