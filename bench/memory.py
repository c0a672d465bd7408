"""Peak anonymous memory of this process, sampled in a thread."""

import threading
from types import TracebackType

from exporter.pipeline.step_clock import anonymous_bytes


class Watch:
    """Context manager; after the block, `peak` is the largest sampled anonymous memory, in bytes."""

    def __init__(self, interval: float = 0.05) -> None:
        self.peak = 0
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            if self._stopped.wait(self._interval):
                return

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
