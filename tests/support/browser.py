"""Drives headless Chromium through a pipe, by the DevTools protocol, to see what a page requests, logs and shows."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
TIMEOUT = 60.0  # seconds to wait for a message


@dataclass
class Look:
    """Observations of a page: requests, console and log messages, widths in pixels, and a screenshot."""

    requests: list[str]
    messages: list[str]
    scroll_width: int
    inner_width: int
    background: str
    picture: bytes


class Browser:
    """A context in which a browser runs. No host name resolves, so it fetches nothing from a network."""

    def __init__(self, profile: Path) -> None:
        own_read, its_write = os.pipe()
        its_read, own_write = os.pipe()

        def as_three_and_four() -> None:
            os.dup2(os.dup(its_read), 3)
            os.dup2(os.dup(its_write), 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options],
            pass_fds=(3, 4, its_read, its_write),
            preexec_fn=as_three_and_four,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        self.read, self.write, self.number, self.rest = own_read, own_write, 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(TIMEOUT)
        os.close(self.read)
        os.close(self.write)

    def look(self, page: Path, width: int, theme: str, whole: bool = False) -> Look:
        """Open a local page with a window width and a theme, "light" or "dark". `whole` captures the full page."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not self._of("Page.loadEventFired"):
            self._take()
        widths = "[document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"
        found = self.call("Runtime.evaluate", expression=widths, returnByValue=True)["result"]["value"]
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        messages = [entry["entry"]["text"] for entry in self._of("Log.entryAdded")]
        messages += [str(event["args"]) for event in self._of("Runtime.consoleAPICalled")]
        messages += [str(event["exceptionDetails"]) for event in self._of("Runtime.exceptionThrown")]
        requests = [event["request"]["url"] for event in self._of("Network.requestWillBeSent")]
        return Look(requests, messages, *found, base64.b64decode(picture["data"]))

    def pdf(self, page: Path) -> bytes:
        """The page as a PDF, as it would be printed."""
        self.call("Page.navigate", url=page.as_uri())
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        session = {"sessionId": self.session} if getattr(self, "session", None) else {}
        message = {"id": self.number, "method": method, "params": parameters, **session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._take()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def _take(self) -> dict[str, Any]:
        """Receive the next message. Events are also recorded."""
        until = time.monotonic() + TIMEOUT
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"no message from chromium for {TIMEOUT} s.")
            self.rest += os.read(self.read, 1 << 20)
        first, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(first)
        if "method" in message:
            self.events.append(message)
        return message
