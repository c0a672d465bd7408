"""SIGINT and SIGTERM handling that survives swallowed KeyboardInterrupts.

A KeyboardInterrupt that is raised inside a callback of the interpreter (a weak reference's while modules load, a
finalizer) is printed as "ignored" and gone. The request is therefore remembered, and raised again at the next event.
"""

import signal
from types import FrameType

_asked: list[int] = []  # numbers of the signals that came


def install() -> None:
    """Handle both signals; a shell's background jobs start with SIGINT ignored, so it is set, not left as found."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    raise KeyboardInterrupt


def raise_if_asked() -> None:
    """KeyboardInterrupt when a signal came, now or earlier."""
    if _asked:
        raise KeyboardInterrupt
