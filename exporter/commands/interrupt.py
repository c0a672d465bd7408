"""SIGINT and SIGTERM handling that survives swallowed KeyboardInterrupts.

A KeyboardInterrupt that is raised inside a callback of the interpreter (a weak reference's while modules load, a
finalizer) is printed as "ignored" and lost. The signal is therefore recorded, and raised again at the next event.
"""

import signal
from types import FrameType

_received: list[int] = []  # numbers of the signals received so far


def install() -> None:
    """Handle SIGINT and SIGTERM. SIGINT is set too because a shell starts background jobs with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal was received, now or earlier."""
    if _received:
        raise KeyboardInterrupt
