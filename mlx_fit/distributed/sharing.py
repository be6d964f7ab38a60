"""Ranks on one machine share its memory."""

from __future__ import annotations

import socket

from mlx_fit.communicator import gather
from mlx_fit.distributed.ring import Ring
from mlx_fit.runtime.memory import room, set_share


def share_memory(ring: Ring) -> None:
    """Give each rank an equal part of what the ranks of its machine hold and can still get.

    Otherwise each would plan with all of it. Ranks with one host name are on one machine.
    """
    host = socket.gethostname()
    known = [each for each in gather(ring, [host, *room()], "memory") if each[0] == host]
    left = [each[2] for each in known if each[2] is not None]
    if len(known) == 1 or not left:
        set_share(None)
    else:
        set_share((sum(each[1] for each in known) + min(left)) // len(known))
