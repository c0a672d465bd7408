"""Progress events of long jobs: shown as a bar on a terminal, written as JSON lines, or handled by a callback."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One step of a stage is done.

    stage: `prepare`, `read data`, `hash` (its steps are MiB), `check`, `calibrate`, `quantize`, `write`, `verify`,
    `evaluate`, `study units`, `study points`, or `note` (a message the user should read).
    done, total: steps of this stage. numbers: measured values of this step, such as `error`.
    """

    stage: str
    done: int
    total: int
    message: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Event], None]
"""Receives every event of a job, in the order in which steps finish, from the thread that runs the job."""


def ignore(event: Event) -> None:
    """A listener that ignores every event."""
