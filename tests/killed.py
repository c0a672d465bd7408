"""An export that is killed while it runs."""

import os
import signal
from collections.abc import Callable

from exporter.events import Event


def killed_after(unit: int, export: Callable[[Callable[[Event], None]], object]) -> None:
    """Run `export`, which takes a listener, in a child process that SIGKILLs itself once `unit` blocks are finished."""

    def die(event: Event) -> None:
        if event.stage == "quantize" and event.done == unit and event.message != "resumed":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            export(die)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
