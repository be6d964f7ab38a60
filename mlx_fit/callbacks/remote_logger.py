"""Events of a run, sent to a server as JSON."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mlx_fit.callbacks.as_json import as_json, dumps
from mlx_fit.callbacks.base import Callback
from mlx_fit.checks import natural, number
from mlx_fit.errors import ConfigurationError


class RemoteLogger(Callback):
    """Sends each epoch and each evaluation of a fit to a URL, as JSON by POST.

    The body is ``{"event": "epoch", "epoch": 0, "step": 40, "logs": {"loss": 0.5, ...}}``; events
    are ``"train_begin"``, ``"epoch"``, ``"evaluation"``, ``"train_end"`` and ``"exception"`` (with
    ``"error"``). A background thread sends them in order, so training never waits for the network.
    A server that cannot be reached, or answers with an error, is one warning; events go on being
    tried, and the oldest are dropped where more than ``max_queue`` wait.

    Args:
        url: ``http://`` or ``https://``.
        headers: sent with every request, for instance ``{"Authorization": "Bearer ..."}``.
        timeout: seconds for one request, and for what still waits when the fit ends.
        max_queue: events that may wait.

    Attributes:
        num_sent, num_failed: requests that were answered well, and those that were not or whose
            event was dropped.

    Example:
        >>> callback = RemoteLogger("http://127.0.0.1:9000/publish")
    """

    first_rank_only = True

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
        max_queue: int = 1000,
    ) -> None:
        parts = urlsplit(url if isinstance(url, str) else "")
        if parts.scheme not in ("http", "https") or not _has_address(parts):
            raise ConfigurationError(
                f"RemoteLogger: url={url!r}; expected a text such as 'http://host:9000/publish'."
            )
        own = {} if headers is None else headers
        texts = [*own.keys(), *own.values()] if isinstance(own, Mapping) else [own]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigurationError(
                f"RemoteLogger: headers={headers!r}; expected a dict of texts, or None."
            )
        self.url = url
        self.num_sent = 0
        self.num_failed = 0
        self._headers = {"Content-Type": "application/json", **own}
        self._timeout = number("RemoteLogger: timeout", timeout, 1e-3)
        self._max_queue = natural("RemoteLogger: max_queue", max_queue, 1)
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._has_warned = False

    def on_train_begin(self, logs: Any) -> None:
        """Start the sender."""
        self._finish()
        self._has_warned, self._failure = False, None
        self._queue = queue.Queue(self._max_queue)
        self._thread = threading.Thread(target=self._send_all, args=(self._queue,), daemon=True)
        self._thread.start()
        info = self.trainer.info
        self._put("train_begin", epochs=info.epochs, steps_per_epoch=info.steps_per_epoch)

    def on_validation_end(self, logs: Any) -> None:
        """Send an evaluation."""
        self._put("evaluation", logs=as_json(logs))

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Send an epoch."""
        self._put("epoch", logs=as_json(logs))

    def on_train_end(self, logs: Any) -> None:
        """Send what is left, for at most ``timeout`` seconds."""
        self._put("train_end", stopped_by=self.trainer.history.stopped_by)
        self._finish()

    def on_exception(self, error: BaseException) -> None:
        """Say that the fit failed."""
        self._put("exception", error=f"{type(error).__name__}: {error}")
        self._finish()

    def _put(self, event: str, **facts: Any) -> None:
        if self._thread is None:
            return
        run = self.trainer
        body = {"event": event, "epoch": run.epoch, "step": run.step, **facts}
        self._enqueue(dumps(body).encode())
        self._warn()

    def _enqueue(self, item: bytes | None) -> None:
        while True:
            try:
                return self._queue.put_nowait(item)
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:  # the sender was quicker
            return
        self.num_failed += 1

    def _finish(self) -> None:
        if self._thread is None:
            return
        self._enqueue(None)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            self._failure = self._failure or f"events were left after {self._timeout:g} seconds"
            self.num_failed += self._queue.qsize()
        self._thread = None
        self._warn()

    def _warn(self) -> None:
        """Warn of the first failure, from the thread that trains, where the user sees it."""
        if self._failure is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"RemoteLogger could not send to {self.url}: {self._failure}. Training goes on.",
                stacklevel=3,
            )

    def _send_all(self, waiting: queue.Queue[bytes | None]) -> None:
        """What the background thread does, until it takes None."""
        # Here: importing mlx_fit stays cheap.
        from http.client import HTTPException
        from urllib.request import Request, urlopen

        while (body := waiting.get()) is not None:
            request = Request(self.url, body, self._headers, method="POST")
            try:
                with urlopen(request, timeout=self._timeout) as answer:
                    answer.read()
            except (OSError, ValueError, HTTPException) as error:
                self.num_failed += 1
                self._failure = self._failure or f"{type(error).__name__}: {error}"
            else:
                self.num_sent += 1


def _has_address(parts: SplitResult) -> bool:
    """Whether a URL names a host, and no port or one that can be."""
    try:
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
