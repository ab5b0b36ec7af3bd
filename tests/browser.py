"""A headless browser for tests of pages."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path

from PIL import Image


class Browser:
    """A headless browser without a network; DevTools messages, ended by a zero byte, on its
    descriptors 3 and 4."""

    OFFLINE = (
        "--proxy-server=127.0.0.1:9",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--disable-background-networking",
    )

    def __init__(self, program: str, folder: Path):
        commands, self.write_end = os.pipe()
        self.read_end, answers = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", program]
            + [*flags, f"--user-data-dir={folder}", *self.OFFLINE],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder)},
        )
        os.close(commands)
        os.close(answers)
        self.received, self.events, self.number, self.session = b"", [], 0, {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda message: message.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, wanted, timeout: float = 60) -> dict:
        """The first message that is wanted; those before it are kept as events."""
        until = time.monotonic() + timeout
        while True:
            while b"\0" not in self.received:
                ready, _, _ = select.select(
                    [self.read_end], [], [], max(0, until - time.monotonic())
                )
                assert ready, f"the browser has not answered in {timeout} s"
                part = os.read(self.read_end, 2**20)
                assert part, "the browser has ended"
                self.received += part
            first, self.received = self.received.split(b"\0", 1)
            message = json.loads(first)
            if wanted(message):
                return message
            self.events.append(message)

    def show(self, path: Path, width: int, height: int, scheme: str) -> None:
        self.events.clear()
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self("Page.navigate", url=path.as_uri())
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
            "value"
        ]

    def screenshot(self, path: Path) -> Image.Image:
        """The whole page, also what is below the window."""
        width, height = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
        return Image.open(path).convert("RGB")

    def said(self, method: str) -> list[dict]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        try:
            self.session = {}
            self("Browser.close")
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.write_end)
            os.close(self.read_end)
