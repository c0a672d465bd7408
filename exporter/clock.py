"""Measured seconds and peaks of the steps of a job, as `steps` predicts them."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from exporter.device import Device, peak_bytes, reset_peak
from exporter.steps import Step

EVERY = 0.05  # seconds between two looks at the process


class Clock:
    """Times named steps while it is entered; a thread watches what the process holds beside the page cache."""

    def __init__(self, device: Device) -> None:
        self.steps: list[Step] = []
        self._device = device
        self._last = time.monotonic()
        self._host_peak = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="memory", daemon=True)

    def __enter__(self) -> Self:
        reset_peak(self._device)
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watch.join()

    def lap(self, name: str) -> None:
        """The time since the last lap, and the peaks in it, belong to `name`."""
        now = time.monotonic()
        device_peak, resident = peak_bytes(self._device)
        host_peak = max(self._host_peak, held_bytes()) or resident
        self.steps.append(Step(name, device_peak, host_peak, now - self._last))
        reset_peak(self._device)
        self._last, self._host_peak = now, 0

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._host_peak = max(self._host_peak, held_bytes())


def held_bytes() -> int:
    """Anonymous memory of this process: what it holds beside the page cache. 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines() if line.startswith("RssAnon"))
    return next((int(line[1]) * 1024 for line in lines), 0)
