"""A headless Chromium, spoken to in the DevTools protocol over pipes: pages, sizes, colours, errors, images."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()
# The browser reads commands from file 3 and answers on file 4.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 23); os.dup2(int(sys.argv[2]), 24);"  # one of them may be 3 or 4
    "os.dup2(23, 3); os.dup2(24, 4); os.close(23); os.close(24); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 180.0  # seconds: what a busy machine reads from its disk for the first time begins slowly


def program() -> str | None:
    """Returns the path of a browser, or `None` where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser.

    Attributes:
      events: what the page has told since it was opened: console messages, exceptions, requests.
    """

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._buffer, self._last, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the result of a command."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: pathlib.Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Shows a file in a window of this size, and waits until it is loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.send("Page.navigate", url=file.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, script: str) -> Any:
        """Returns what a script comes to, as JSON has it."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: pathlib.Path) -> None:
        """Writes the whole page as a PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Returns the parameters of the events of these kinds."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._answers, 1 << 20) if ready else b""
            assert part, f"the browser says nothing more (its exit status: {self._process.poll()})"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def opened(program: str, profile: pathlib.Path) -> Iterator[Browser]:
    """Yields a browser with a profile of its own, and ends it."""
    there, commands = os.pipe()
    answers, back = os.pipe()
    command = [sys.executable, "-c", _LAUNCH, str(there), str(back), program, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, pass_fds=(there, back), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(there), os.close(back)
    try:
        yield Browser(process, commands, answers)
    finally:
        os.close(commands), os.close(answers)  # without its pipe, the browser ends
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
