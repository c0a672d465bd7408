"""A headless Chromium for tests, driven through chromedriver's HTTP interface with the standard library alone."""

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name leads anywhere
)
TAB = "\ue004"  # WebDriver's code points for keys
ENTER = "\ue007"


class Browser:
    """One page in one session. base: the session's address."""

    def __init__(self, base: str) -> None:
        self.base = base

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return _call(f"{self.base}{path}", body)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        """Open a file at a width in CSS pixels."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.call("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def screenshot(self, path: Path) -> None:
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def console(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.call("/se/log", {"type": "performance"})]
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]


def _call(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as reply:
        return json.loads(reply.read())["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh Chromium with a profile of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory() as profile:
        command = [str(DRIVER), "--port=0", "--allowed-ips=127.0.0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
            try:
                assert driver.stdout
                line = next(line for line in driver.stdout if "started successfully on port" in line)
                base = f"http://127.0.0.1:{line.rstrip().rstrip('.').rpartition(' ')[2]}"
                options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": CHROMIUM}
                always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
                session = _call(f"{base}/session", {"capabilities": {"alwaysMatch": always}})["sessionId"]
                opened = Browser(f"{base}/session/{session}")
                try:
                    opened.call("/url", {"url": "about:blank"})
                    opened.requested()  # the browser's own start page
                    yield opened
                finally:
                    _call(f"{base}/session/{session}", method="DELETE")
            finally:
                driver.terminate()
