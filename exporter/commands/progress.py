"""Progress display: a bar with the remaining time on a terminal, else plain lines; JSON lines with `--json`."""

import json
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from exporter.commands.interrupt import raise_if_interrupted
from exporter.commands.next_steps import named
from exporter.events import Event

NAMES = {
    "prepare": "preparing",
    "data": "reading data",
    "read data": "reading calibration samples",
    "hash": "hashing the source, MiB",
    "check": "checking finished blocks",
    "calibrate": "reading calibration data",
    "quantize": "quantizing blocks",
    "write": "writing shards",
    "verify": "verifying",
    "evaluate": "evaluating",
    "study units": "quantizing units",
    "study points": "scoring settings",
}
QUIET_SECONDS = 5.0  # shortest time between two plain lines of one stage


class ProgressDisplay:
    """Listener that shows events on stderr; use it as a context manager."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._console = Console(stderr=True)
        self._bars: dict[str, TaskID] = {}
        self._printed_at: dict[str, float] = {}  # time of the last plain line of each stage, in seconds
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if not self._json and self._console.is_terminal:
            columns = (
                TextColumn("{task.description:26}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            )
            self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        if isinstance(error, Exception):
            raise_if_interrupted()  # torch's C code turns an interrupt into a ValueError

    def __call__(self, event: Event) -> None:
        raise_if_interrupted()
        if self._json:
            line = {"stage": event.stage, "done": event.done, "total": event.total, "message": event.message}
            print(json.dumps(line | {"numbers": dict(event.numbers)}), file=sys.stderr, flush=True)
        elif event.stage == "note":
            self._console.print(f"note: {named(event.message)}", markup=False, highlight=False)
        elif self._progress:
            self._bar(self._progress, event)
        else:
            self._line(event)

    def hide(self) -> None:
        """Remove the bars before other text is printed; the next event shows them again."""
        if self._progress:
            self._progress.stop()

    def _bar(self, progress: Progress, event: Event) -> None:
        key = self._key(event)
        if not progress.live.is_started:
            progress.start()
        if key not in self._bars:
            self._bars[key] = progress.add_task(key, total=event.total)
        progress.update(self._bars[key], completed=event.done, total=event.total)

    def _line(self, event: Event) -> None:
        key, now = self._key(event), time.monotonic()
        if event.stage == "prepare":
            return None if event.done else print(key, file=sys.stderr, flush=True)
        if event.done < event.total and now - self._printed_at.get(key, -QUIET_SECONDS) < QUIET_SECONDS:
            return
        self._printed_at[key] = now
        error = f", error {event.numbers['error']:.4f}" if "error" in event.numbers else ""
        left = f", about {event.numbers['left']:.0f} s left" if event.numbers.get("left") else ""
        print(f"{key}: {event.done}/{event.total}{error}{left}", file=sys.stderr, flush=True)

    @staticmethod
    def _key(event: Event) -> str:
        """Name of the bar or line of an event; a stage that runs per model or per component gets one for each."""
        name = NAMES.get(event.stage, event.stage)
        if event.stage == "evaluate" and ":" in event.message:
            return f"{name} {event.message}"
        return f"{name}: {event.message}" if event.stage in ("prepare", "calibrate") else name
