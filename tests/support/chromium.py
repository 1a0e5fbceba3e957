"""Chromium without a window, driven by its DevTools protocol over a pipe: it needs no driver, and no port is opened."""

import base64
import io
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",  # which the root of a container cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""The last four keep it from asking for anything in a network."""
SECONDS = 60
"""Longest time for one answer, on a busy machine."""


class Page:
    """A page of a running Chromium."""

    def __init__(self, commands: int, replies: int, log: Path) -> None:
        self._commands, self._replies, self._log = commands, replies, log
        self._sent, self._buffer = 0, b""
        self._session: str | None = None
        self.errors: list[str] = []
        """What the page has thrown, or written to the console as an error."""
        self.loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Open a page, and wait until it has been loaded."""
        self.loaded = False
        self._call("Page.navigate", url=url)
        while not self.loaded:
            self._receive()

    def show(self, width: int, height: int, scheme: str) -> None:
        """Let the page be shown as a telephone of that size would, in the scheme "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page, as JSON carries it."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def run(self, script: str) -> bool:
        """Run JavaScript in the page. Returns whether it ended without an exception."""
        return "exceptionDetails" not in self._call("Runtime.evaluate", expression=script)

    def picture(self, clip: dict[str, float]) -> np.ndarray:
        """Colours of a part of the page, of shape (height, width, 3), from 0 to 1."""
        from matplotlib.image import imread

        taken = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1})
        return np.asarray(imread(io.BytesIO(base64.b64decode(taken["data"])))[..., :3])

    def _call(self, method: str, **parameters: Any) -> Any:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        text = json.dumps(message).encode() + b"\0"
        with suppress(BrokenPipeError):  # if Chromium has ended, which _receive finds
            while text:
                text = text[os.write(self._commands, text) :]
        while (reply := self._receive()).get("id") != self._sent:
            pass
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message: a reply, or an event, which is noted."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium has not answered for {SECONDS} s: {self._log.read_text()}"
            received = os.read(self._replies, 1 << 20)
            assert received, f"Chromium has ended: {self._log.read_text()}"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, values = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert"):
            self.errors.append(str(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(str(values["entry"]))
        return message


@contextmanager
def chromium() -> Iterator[Page]:
    """A page of a Chromium of its own; the test is skipped where none is installed."""
    if PROGRAM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    to_read, commands = os.pipe()
    replies, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3, and answers to descriptor 4.
        redirected = ["bash", "-c", f'exec 3<&{to_read} 4>&{to_write} && exec "$@"', "bash"]
        started = [*redirected, PROGRAM, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        log = Path(profile, "log")
        with log.open("w") as file:
            browser = subprocess.Popen(
                started, pass_fds=(to_read, to_write), stdout=file, stderr=file, start_new_session=True
            )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Page(commands, replies, log)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            os.close(commands)
            os.close(replies)
