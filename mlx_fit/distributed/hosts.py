"""Which machines ranks run on: a list of names, or a file."""

from __future__ import annotations

import ipaddress
import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fit.errors import ConfigurationError

LOOPBACK = "127.0.0.1"
_HERE = ("localhost", LOOPBACK, "::1")


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        name: what ssh connects to.
        ips: its addresses for collectives; empty: looked up by name.
        rdma: its RDMA device towards each host of the file, None towards itself (for JACCL).
        num_ranks: how many it takes, if the file says so.
    """

    name: str
    ips: tuple[str, ...] = ()
    rdma: tuple[Any, ...] = ()
    num_ranks: int | None = field(default=None, compare=False)

    @property
    def is_here(self) -> bool:
        """Whether its ranks are started without ssh."""
        return self.name in (*_HERE, socket.gethostname())

    @property
    def ip(self) -> str:
        """The address for collectives.

        Raises:
            ConfigurationError: the name has none that other machines could reach.
        """
        if self.ips:
            return self.ips[0]
        try:
            found = socket.getaddrinfo(self.name, None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigurationError(
                f"host {self.name!r} has no IPv4 address here ({error}). Give one in a host file: "
                f'[{{"ssh": "{self.name}", "ips": ["10.0.0.1"]}}].'
            ) from error
        return str(found[0][4][0])


def read_hosts(text: str) -> list[Host]:
    """The hosts of a comma-separated list of names, or of a file.

    A file is MLX's JSON (a list of ``{"ssh": name, "ips": [...], "rdma": [...]}``, or an object
    with it under ``"hosts"``), or has one name a line, with ``slots=2`` after it for two ranks
    and ``#`` before comments.

    Raises:
        ConfigurationError: it names none, or cannot be read.

    Example:
        >>> [host.name for host in read_hosts("mini1,mini2")]
        ['mini1', 'mini2']
    """
    path = Path(text)
    if not path.is_file():
        if "/" in text or text.endswith((".json", ".txt")):
            raise ConfigurationError(f"--hosts {text}: there is no such file.")
        hosts = [Host(name.strip()) for name in text.split(",")]
    else:
        content = _content(path)
        is_json = content.lstrip().startswith(("[", "{"))
        hosts = _from_json(path, content) if is_json else _from_lines(path, content)
    if not hosts or not all(_is_name(host.name) for host in hosts):
        raise ConfigurationError(
            f"--hosts {text}: expected names of machines, as a,b,c, or a file with them."
        )
    return hosts


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigurationError(
            f"--hosts {path} cannot be read ({why}); expected JSON, or a name of a machine a line."
        ) from error


def _is_name(name: str) -> bool:
    """No empty one, and none that ssh would take for an option."""
    return bool(name) and not name.startswith("-") and not any(c.isspace() for c in name)


def _from_json(path: Path, content: str) -> list[Host]:
    try:
        data = json.loads(content)
        rows = data["hosts"] if isinstance(data, dict) else data
        for row in rows:
            if isinstance(row.get("ips"), str) or isinstance(row.get("rdma"), str):
                raise TypeError("ips and rdma are lists")
        return [
            Host(str(row["ssh"]), tuple(row.get("ips", ())), tuple(row.get("rdma", ())))
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} is no host file ({error!r}); expected "
            '[{"ssh": "name", "ips": ["10.0.0.1"]}, ...], as mlx.launch reads it.'
        ) from error


def _from_lines(path: Path, content: str) -> list[Host]:
    hosts = []
    for number, line in enumerate(content.splitlines(), 1):
        name, *facts = line.partition("#")[0].split() or [""]
        if not name:
            continue
        slots = [fact.removeprefix("slots=") for fact in facts]
        if len(slots) > 1 or not all(slot.isdigit() and int(slot) for slot in slots):
            raise ConfigurationError(
                f"{path}:{number}: {line!r}; expected a name, or NAME slots=2."
            )
        ips = (name,) if _is_ip(name) else ()
        hosts.append(Host(name, ips, num_ranks=int(slots[0]) if slots else None))
    return hosts


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def seat(hosts: list[Host], num_ranks: int | None) -> list[Host]:
    """The host of each rank: in blocks, as even as possible, or as the hosts' slots say.

    Example:
        >>> [host.name for host in seat(read_hosts("a,b"), 3)]
        ['a', 'a', 'b']
    """
    slots = [host.num_ranks or 1 for host in hosts]
    if num_ranks is not None and num_ranks != sum(slots):
        share, more = divmod(num_ranks, len(hosts))
        slots = [share + (index < more) for index in range(len(hosts))]
    return [host for host, slot in zip(hosts, slots, strict=True) for _ in range(slot)]
