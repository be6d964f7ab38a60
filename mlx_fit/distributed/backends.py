"""What each of MLX's backends wants to find in a rank's environment, as ``mlx.launch`` sets it."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_fit.distributed.environment import CONTROL, Address
from mlx_fit.distributed.hosts import LOOPBACK, Host
from mlx_fit.errors import ConfigurationError

BACKENDS = ("ring", "mpi", "nccl", "jaccl")
STARTING_PORT = 32323  # mlx.launch's


@dataclass
class Surroundings:
    """Variables of a rank, and files whose paths become variables."""

    variables: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def surroundings(backend: str, hosts: Sequence[Host], port: int) -> list[Surroundings]:
    """What to set for each rank.

    On this machine alone all addresses are loopback with free ports; else ports count up from
    ``port``: a ring's ranks in order, then the control plane's.

    Raises:
        ConfigurationError: a host lacks what the backend needs.
    """
    if len(hosts) == 1:
        return [Surroundings()]  # a group of one: MLX's ring would wait for itself
    ips, ports = _addresses(hosts, port)
    ranks = [Surroundings({"MLX_RANK": str(rank)}) for rank in range(len(hosts))]
    for rank in ranks:
        rank.variables[CONTROL] = str(Address(ips[0], ports[-1]))
    if backend == "ring":
        ring = json.dumps([[f"{ip}:{port}"] for ip, port in zip(ips, ports, strict=False)])
        for rank in ranks:
            rank.files["MLX_HOSTFILE"] = ring
    elif backend == "nccl":
        for rank, device in zip(ranks, _numbers_on_host(hosts), strict=True):
            rank.variables |= {
                "NCCL_HOST_IP": ips[0],
                "NCCL_PORT": str(ports[0]),
                "MLX_WORLD_SIZE": str(len(hosts)),
                "CUDA_VISIBLE_DEVICES": str(device),
            }
    elif backend == "jaccl":
        _check_rdma(hosts)
        for rank in ranks:
            rank.variables["MLX_JACCL_COORDINATOR"] = f"{ips[0]}:{ports[0]}"
            rank.files["MLX_IBV_DEVICES"] = json.dumps([list(host.rdma) for host in hosts])
    return ranks


def _addresses(hosts: Sequence[Host], port: int) -> tuple[list[str], list[int]]:
    """The address of each rank, and a port for each and one more."""
    number = len(hosts) + 1
    if all(host.is_here for host in hosts):
        return [host.ips[0] if host.ips else LOOPBACK for host in hosts], free_ports(number)
    for host in hosts:
        if host.is_here and not host.ips:
            raise ConfigurationError(
                f"host {host.name!r} is this machine, and others have to reach it: give its "
                f'address in a host file, as [{{"ssh": "{host.name}", "ips": ["10.0.0.1"]}}, ...].'
            )
    return [host.ip for host in hosts], list(range(port, port + number))


def free_ports(number: int) -> list[int]:
    """Ports of the loopback that nobody uses, outside those that outgoing connections get."""
    ports: list[int] = []
    for _ in range(1000 * number):
        port = random.randrange(20000, 32000)
        with socket.socket() as sock:
            try:
                sock.bind((LOOPBACK, port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
        if len(ports) == number:
            return ports
    raise ConfigurationError(f"This machine has no {number} free ports between 20000 and 32000.")


def _numbers_on_host(hosts: Sequence[Host]) -> list[int]:
    """The how manieth rank of its host each one is."""
    seen: Counter[str] = Counter()
    numbers = []
    for host in hosts:
        numbers.append(seen[host.name])
        seen[host.name] += 1
    return numbers


def _check_rdma(hosts: Sequence[Host]) -> None:
    for rank, host in enumerate(hosts):
        if len(host.rdma) != len(hosts) or host.rdma[rank] is not None:
            raise ConfigurationError(
                f"host {host.name!r} has rdma {list(host.rdma)}; jaccl needs a host file in which "
                f"each of the {len(hosts)} hosts names its device towards every host, and null "
                "towards itself. mlx.distributed_config writes one."
            )
