"""Headless Chromium, driven through its pipe, to look at pages as a person would."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

SECONDS = 60


class Page:
    """A page in a browser: messages of the DevTools protocol, each ended by a zero byte."""

    def __init__(self, send, receive):
        self._send, self._receive = send, receive
        self._number, self._session, self._rest = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")

    def call(self, method, **params):
        """A method of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._receive, 1 << 16)
            assert part, "the browser has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def size(self, width, height):
        """Have the window so large."""
        options = {"deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **options)

    def value(self, script):
        """What a piece of JavaScript gives."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script):
        """The first true value of a script."""
        end = time.monotonic() + SECONDS
        while not (found := self.value(script)):
            if time.monotonic() > end:
                pytest.fail(f"never true: {script}\n{self.value('document.body.innerText')}")
            time.sleep(0.1)
        return found

    def picture(self):
        """A PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def found_browser():
    """The browser's path. Skips the test where there is none, and in CI."""
    if os.environ.get("CI"):
        pytest.skip("pages are not looked at in CI")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or pytest.skip("chromium is not installed (apt-get install chromium)")


@contextmanager
def opened(url, width=1200, height=800):
    """The page at an address."""
    chromium = found_browser()
    near, send = os.pipe()
    receive, far = os.pipe()
    to_it, from_it = (fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (near, far))
    os.close(near)
    os.close(far)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-3d-apis --hide-scrollbars --no-first-run"
    )
    # Chromium reads from descriptor 3 and writes to 4.
    command = [chromium, *flags.split(), "--remote-debugging-pipe"]
    code = (
        f"import os; os.dup2({to_it}, 3); os.dup2({from_it}, 4); os.execv({chromium!r}, {command})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=(to_it, from_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(to_it)
        os.close(from_it)
        try:
            page = Page(send, receive)
            page.size(width, height)
            page.call("Page.navigate", url=str(url))
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            process.kill()
            os.close(send)
            os.close(receive)
