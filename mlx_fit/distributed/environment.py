"""What a launcher says to its ranks in environment variables, and where the control plane meets.

The ranks of MLX's own launcher and of ``mpirun`` are served, too: an address is derived from what
MLX itself reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_fit.errors import ConfigurationError

CONTROL = "MLX_FIT_CONTROL"  # rank 0's host:port for the control plane
TOKEN = "MLX_FIT_TOKEN"  # what ranks of one run have in common
RESTART = "MLX_FIT_RESTART"  # how often the launcher has started the ranks again
PORT_OFFSET = 1000
# What describes a run; a launcher that runs within another one does not pass it on.
OF_A_RUN = {
    *("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"),
    *("NCCL_HOST_IP", "NCCL_PORT", CONTROL, TOKEN, RESTART),
}


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, name: str = "address") -> Address:
        """``host:port``, with an IPv6 host in brackets.

        Raises:
            ConfigurationError: it is something else.
        """
        host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        is_bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if is_bracketed else host
        is_host = bool(host) and (is_bracketed or ":" not in host)
        if not colon or not is_host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigurationError(
                f"{name}={text!r}; expected rank 0's host:port, as 10.0.0.1:33323 or "
                "[fe80::1]:33323."
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def ring_addresses(environ: Mapping[str, str]) -> list[list[Address]]:
    """The addresses that each rank's ring listens at, from ``MLX_HOSTFILE``; [] without a ring."""
    path = environ.get("MLX_HOSTFILE")
    if not path:
        return []
    try:
        ranks = json.loads(Path(path).read_text() or "[]")
        return [[Address.parse(text) for text in addresses] for addresses in ranks]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"MLX_HOSTFILE={path!r} cannot be read ({error}); expected a JSON list with a list of "
            '"ip:port" for each rank.'
        ) from error


def control_address(environ: Mapping[str, str]) -> Address:
    """Rank 0's address for the control plane.

    ``MLX_FIT_CONTROL`` if it is set; else rank 0's host in the ring's host file, for NCCL, for
    JACCL, or (for MPI on one machine) this machine, with a port derived from theirs.

    Raises:
        ConfigurationError: nothing tells where rank 0 is.
    """
    if text := environ.get(CONTROL):
        return Address.parse(text, CONTROL)
    if ring := ring_addresses(environ):
        taken = {address.port for addresses in ring for address in addresses}
        return Address(ring[0][0].host, _port_beside(ring[0][0].port, taken))
    if host := environ.get("NCCL_HOST_IP"):
        port = int(environ.get("NCCL_PORT", "12345"))
        return Address(host, _port_beside(port, {port}))
    if text := environ.get("MLX_JACCL_COORDINATOR"):
        coordinator = Address.parse(text, "MLX_JACCL_COORDINATOR")
        return Address(coordinator.host, _port_beside(coordinator.port, {coordinator.port}))
    size = environ.get("OMPI_COMM_WORLD_SIZE")
    if size and size == environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
        return Address("127.0.0.1", 20000 + int(_digest(job)[:8], 16) % 12000)
    raise ConfigurationError(
        f"Nothing tells where rank 0 listens for the other ranks. Set {CONTROL}=HOST:PORT on every "
        f"rank (mpirun -x {CONTROL}=HOST:PORT ...), or start with `mlx-fit launch`."
    )


def control_token(environ: Mapping[str, str]) -> str:
    """What tells the ranks of this run from those of another, where the launcher gives it."""
    return environ.get(TOKEN) or environ.get("PMIX_NAMESPACE", "")


def _port_beside(port: int, taken: set[int]) -> int:
    while port in taken:
        port = 1024 + (port - 1024 + PORT_OFFSET) % (65536 - 1024)
    return port


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
