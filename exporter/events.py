"""What a long job tells whoever listens: a bar on a terminal, JSON lines, a test that interrupts."""

from collections.abc import Mapping
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


def ignore(event: Event) -> None:
    """The listener that does nothing."""
