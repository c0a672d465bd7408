"""Clock that measures seconds and peak memory of each step of a job, to compare with the predictions of `steps`."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from exporter.device import Device, peak_bytes, reset_peak
from exporter.out_of_memory import explain_shortage
from exporter.planning.steps import Step, advice

SAMPLING_SECONDS = 0.05  # interval between two readings of the process's memory


class Clock:
    """Measures the steps of a job inside its `with` block; a thread samples the anonymous memory of the process.

    predicted: output of `predict_steps`, once it is known. steps: measured steps in the order in which they began.
    """

    def __init__(self, device: Device) -> None:
        self.predicted: Sequence[Step] = ()
        self._device = device
        self._measured: dict[str, Step] = {}
        self._open: list[str] = []
        self._last = time.monotonic()
        self._host_peak = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._sample_memory, name="memory", daemon=True)

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
        """Every step so far; the time of an inner step does not count for the outer step."""
        return tuple(self._measured.values())

    @contextmanager
    def step(self, name: str, recovery: str = "") -> Iterator[None]:
        """Measure the `with` block as step `name`. An out-of-memory error inside it becomes a MemoryShortage.

        recovery: sentence for that error about the finished work that remains.
        """
        self._lap()
        self._open.append(name)
        needs = next(((s.device_bytes, s.host_bytes) for s in self.predicted if s.name == name), (0, 0))
        hint = "; ".join(text for text in (recovery, advice(name, self._device)) if text)
        try:
            with explain_shortage(name, self._device, needs, hint):
                yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        """Add time and peak memory since the last lap to the innermost open step."""
        now = time.monotonic()
        device_peak, resident = peak_bytes(self._device)
        host_peak = max(self._host_peak, anonymous_bytes()) or resident
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

    def _sample_memory(self) -> None:
        while not self._over.wait(SAMPLING_SECONDS):
            self._host_peak = max(self._host_peak, anonymous_bytes())


def anonymous_bytes(process: int | str = "self") -> int:
    """Anonymous resident memory of a process in bytes, without the page cache; `process` is a process id or "self".

    0 where the system has no `/proc`, or when the process has ended.
    """
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines() if line.startswith("RssAnon"))
    return next((int(line[1]) * 1024 for line in lines), 0)
