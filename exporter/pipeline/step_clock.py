"""Measured seconds and peaks of the steps of a job, beside what `steps` predicts."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from exporter.device import Device, peak_bytes, reset_peak
from exporter.out_of_memory import explained
from exporter.planning.steps import ADVICE, Step

EVERY = 0.05  # seconds between two looks at the process


class Clock:
    """Measures steps while it is entered; a thread watches what the process holds beside the page cache.

    predicted: steps as `predict_steps` says them, once they are known. steps: what was measured, in order.
    """

    def __init__(self, device: Device) -> None:
        self.predicted: Sequence[Step] = ()
        self._device = device
        self._measured: dict[str, Step] = {}
        self._open: list[str] = []
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

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step that was open so far; the time of a step inside another one is its own."""
        return tuple(self._measured.values())

    @contextmanager
    def step(self, name: str, kept: str = "") -> Iterator[None]:
        """Measure the block as `name`. Running out of memory in it is a MemoryShortage.

        kept: what of the work is not lost then, as a sentence.
        """
        self._lap()
        self._open.append(name)
        needs = next(((s.device_bytes, s.host_bytes) for s in self.predicted if s.name == name), (0, 0))
        advice = "; ".join(text for text in (kept, ADVICE[name]) if text)
        try:
            with explained(name, self._device, needs, advice):
                yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        """What was measured since the last lap belongs to the innermost open step."""
        now = time.monotonic()
        device_peak, resident = peak_bytes(self._device)
        host_peak = max(self._host_peak, held_bytes()) or resident
        if self._open:
            name = self._open[-1]
            before = self._measured.get(name, Step(name, 0, 0, 0.0))
            self._measured[name] = Step(
                name,
                max(before.device_bytes, device_peak),
                max(before.host_bytes, host_peak),
                before.seconds + now - self._last,
            )
        reset_peak(self._device)
        self._last, self._host_peak = now, 0

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._host_peak = max(self._host_peak, held_bytes())


def held_bytes(process: int | str = "self") -> int:
    """Anonymous memory of a process (its id; else this one): what it holds beside the page cache.

    0 where the system does not say, or when the process is gone.
    """
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines() if line.startswith("RssAnon"))
    return next((int(line[1]) * 1024 for line in lines), 0)
