"""One save after another, in a thread beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs saves in order, the newest beside the training that goes on.

    Args:
        background: False runs each save at once, in the caller's thread.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, save: Callable[[], None]) -> None:
        """Start a save once the one before it is done.

        Raises:
            Exception: the save before it failed; in the foreground: this one did.
        """
        self.wait()
        if not self._background:
            save()
            return
        # A daemon: a second Ctrl-C must end the process, and what is half-written does no harm.
        self._thread = threading.Thread(
            target=self._run, args=(save,), name="mlx_fit checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the newest save.

        Raises:
            Exception: it failed. It is raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
