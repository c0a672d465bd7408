"""Progress events of long jobs, and the type of the callbacks that receive them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """Progress of a stage: `done` of `total` steps are finished.

    stage: `prepare`, `data`, `read data`, `hash` (its steps are MiB), `check`, `calibrate`, `quantize`, `write`,
    `verify`, `evaluate`, `study units`, `study points`, or `note` (a message for the user).
    done, total: number of steps. numbers: measured values of the last step, such as `error`.
    """

    stage: str
    done: int
    total: int
    message: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


def notice(message: str) -> Event:
    """The event of a message for the user, which belongs to no number of steps."""
    return Event("note", 0, 0, message)


Listener = Callable[[Event], None]
"""Callback for the events of a job; called in the order in which steps finish, in the thread that runs the job."""


@contextmanager
def preparing(on_event: Listener, what: str) -> Iterator[None]:
    """Report a step that has no progress of its own: its start, and its end unless it fails."""
    on_event(Event("prepare", 0, 1, what))
    yield
    on_event(Event("prepare", 1, 1, what))


def ignore(event: Event) -> None:
    """Listener that ignores every event."""
