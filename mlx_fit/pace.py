"""How long an epoch's training takes, apart from evaluations and saves in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Pace:
    """The clock of one pass over data. A batch costs it looks at the clock, and no calls.

    Attributes:
        waited: seconds from the end of a batch to the next: the wait for data.
        num_batches: batches so far, of this process.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a pass."""
        self.waited = 0.0
        self.num_batches = 0
        self._start = perf_counter()
        self._away = 0.0
        self._stopped: float | None = None

    def stop(self) -> None:
        """The pass is over; the clock stands."""
        self._stopped = perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is none of the pass. A clock that stands already stays as it is."""
        if self._stopped is not None:
            yield
            return
        self._stopped = began = perf_counter()
        try:
            yield
        finally:
            self._away += perf_counter() - began
            self._stopped = None

    @property
    def seconds(self) -> float:
        """How long the pass has taken."""
        now = perf_counter() if self._stopped is None else self._stopped
        return max(now - self._start - self._away, 1e-9)

    @property
    def share_waited(self) -> float:
        """The part of the time that was waiting for data, from 0 to 1."""
        return min(self.waited / self.seconds, 1.0)

    @property
    def wait_ms(self) -> float:
        """The mean wait for a batch, in milliseconds."""
        return 1e3 * self.waited / max(self.num_batches, 1)
