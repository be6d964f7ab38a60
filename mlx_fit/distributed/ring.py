"""The group of ranks: who they are, and the one sequencer that issues all collectives.

Every collective is evaluated before the next one is issued, so that all ranks run them in one
order: MLX sums whatever arrives, and in another order the sums would be wrong without a word.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit.distributed.control import ControlPlane
from mlx_fit.distributed.plane import Plane
from mlx_fit.errors import (
    ConfigurationError,
    DistributedError,
    NonFiniteLossError,
    Preempted,
)

_MESSAGE = 0x6D6C7866  # the first word of a message: what is anything else was none
WAITING = "header"  # the phase in which ranks wait for the slowest: its message is small

# Set by mlx.launch and mlx-fit launch, by Open MPI and by MPICH's relatives.
_RANK_NAMES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_FILE_NAMES = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # the ring's, and JACCL's: an entry a rank
_SIZE_NAMES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are, as the launcher says; (0, 1) without one.

    Raises:
        ConfigurationError: the environment makes no sense.
    """
    rank, size = _number(_RANK_NAMES), _number(_SIZE_NAMES)
    for name in _FILE_NAMES:
        if size is None and (path := os.environ.get(name)):
            size = _hosts(name, path)
    if rank is None:
        return 0, 1
    if size is None or not 0 <= rank < size:
        raise ConfigurationError(
            f"The environment says rank {rank} of {size}. Start the script with mlx-fit launch, "
            "mlx.launch or mpirun, or unset MLX_RANK."
        )
    return rank, size


def _number(names: tuple[str, ...]) -> int | None:
    found = next((os.environ[name] for name in names if name in os.environ), None)
    if found is None:
        return None
    if not found.isdigit():
        raise ConfigurationError(f"The environment says {found!r} where a rank or count belongs.")
    return int(found)


def _hosts(name: str, path: str) -> int:
    import json

    try:
        with open(path) as file:
            return len(json.load(file))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{name}={path!r} is no readable list of hosts in JSON: {error}"
        ) from error


@dataclass
class Link:
    """This process's connection with the other ranks. MLX makes one only, for all trainers.

    Attributes:
        group: MLX's group.
        plane: watches over it.
        timeouts: that it was made with.
        failure: of a collective, after which none may run.
    """

    group: mx.distributed.Group
    plane: Plane
    timeouts: tuple[float, float]
    failure: BaseException | None = None


_links: list[Link] = []  # the one of this process, once there is one


class Ring:
    """The ranks of a group, over MLX's collectives.

    Args:
        link: the connection with them.
        uneven: see :class:`~mlx_fit.protocols.Communicator`.

    Attributes:
        rank, size: of the group.
        balances, rates: as for any communicator; of its owner's making.
        step: the collectives of now belong to it, 1-based.
        num_collectives: issued so far.
        num_bytes: sent into them by this rank so far.
        seconds: what they have taken so far, by phase.
    """

    def __init__(self, link: Link, uneven: str) -> None:
        self.rank: int = link.group.rank()
        self.size: int = link.group.size()
        self.uneven = uneven
        self.balances = False
        self.rates: tuple[float, ...] | None = None
        self.num_collectives = 0
        self.num_bytes = 0
        self.seconds: dict[str, float] = {}
        self._link = link
        self.step = 0
        self._known: BaseException | None = None

    def at_step(self, step: int) -> None:
        """Which step the collectives that follow belong to, for messages."""
        self.step = step

    def sum(self, arrays: list[mx.array], phase: str = "sum") -> list[mx.array]:
        """Elementwise sums over the ranks, evaluated, in the order of ``arrays``.

        The list is emptied: what nobody else holds is summed in place.
        """
        arrays.reverse()
        return [self._run(mx.distributed.all_sum, arrays, phase) for _ in range(len(arrays))]

    def gather_arrays(self, array: mx.array, phase: str = "gather") -> mx.array:
        """The arrays of all ranks, equal in shape, joined along their first axis."""
        return self._run(mx.distributed.all_gather, [array], phase)

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, by rank.

        Raises:
            DistributedError: another rank is not in here, but in another collective.
        """
        begun = self.gather_arrays(mx.array([_MESSAGE, len(message)], mx.int32), "message")
        words: list[int] = begun.tolist()  # type: ignore[assignment]
        if words[::2] != [_MESSAGE] * self.size:
            raise DistributedError(
                f"Rank {self.rank} exchanges a message where another rank does something else: "
                "they are not at the same place. All ranks must call fit, evaluate, predict, save "
                "and load together, also in callbacks: none of them under `if trainer.rank == 0:`."
            )
        sizes = words[1::2]
        longest = max(sizes)
        padded = np.zeros(longest, np.uint8)
        padded[: len(message)] = np.frombuffer(message, np.uint8)
        found = np.array(self.gather_arrays(mx.array(padded), "message"))
        rows = found.reshape(self.size, longest)
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def _run(
        self, collective: Callable[..., mx.array], arrays: list[mx.array], phase: str
    ) -> mx.array:
        """The collective of the last of some arrays, which is taken from the list."""
        if self._link.failure is not None:
            raise DistributedError(
                f"No collective runs after one has failed: {self._link.failure}"
            ) from self._link.failure
        mx.eval(arrays[-1])  # what can fail on this rank alone fails here, where nobody waits yet
        self.num_collectives += 1
        self.num_bytes += arrays[-1].nbytes
        start = perf_counter()
        try:
            with self._link.plane.watching(self.step, phase):
                # On the CPU: a GPU's buffer that waits for a slow peer is killed after seconds.
                result = collective(arrays.pop(), group=self._link.group, stream=mx.cpu)
                mx.eval(result)  # host synchronisation with all ranks
        except BaseException as error:
            self._link.failure = error
            if isinstance(error, RuntimeError) and not isinstance(error, DistributedError):
                raise DistributedError(
                    f"A collective failed ({phase}, step {self.step}): {error}"
                ) from error
            raise
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start
        return result

    def knows(self, error: BaseException) -> None:
        """All ranks raise this error, so nobody needs to be told of it."""
        self._known = error

    def report(self, error: BaseException) -> None:
        """Tell the other ranks why this one leaves, unless all of them have come to the same."""
        is_common = isinstance(error, (NonFiniteLossError, Preempted))
        if not is_common and error is not self._link.failure and error is not self._known:
            self._link.plane.report(error, self.step)


def check_backend(size: int) -> None:
    """Raise unless MLX has a backend for several ranks on this machine."""
    if size > 1 and not mx.distributed.is_available():
        raise ConfigurationError(
            "This build of MLX has no distributed backend; run one process, or install an mlx "
            "wheel with the ring backend."
        )


def connect(
    rank: int, size: int, timeouts: tuple[float, float], plan: dict[str, Any], uneven: str
) -> Ring:
    """Meet the other ranks, and set MLX's group up.

    A second trainer of the process uses the connection that the first one has made.

    Raises:
        RendezvousError, PlanMismatchError: see :class:`Plane`.
        ConfigurationError: MLX has found another group than the environment describes.
    """
    check_backend(size)
    if not _links:
        plane = ControlPlane(rank, size, *timeouts)
        plane.join(plan)  # first: MLX's own init would hold the interpreter while it waits
        atexit.register(plane.close)
        group = mx.distributed.init(strict=True)
        if group.size() != size:
            raise ConfigurationError(
                f"MLX's group has {group.size()} ranks, the environment says {size}."
            )
        _links.append(Link(group, plane, timeouts))
    elif _links[0].timeouts != timeouts:
        raise ConfigurationError(
            "SyncPolicy: this process has met the other ranks with (timeout, init_timeout) = "
            f"{_links[0].timeouts}, and here they are {timeouts}. Use the same for all trainers."
        )
    return Ring(_links[0], uneven)
