"""Functions for worker processes: a module of its own, so that a worker imports nothing heavy to find them."""

import os
import signal

from exporter.errors import DataError


def double(value: int) -> int:
    if value < 0:
        raise DataError("negative")
    return 2 * value


def read_without_memory(value: int) -> int:
    """An error of mmq that hides a lack of memory."""
    try:
        raise MemoryError
    except MemoryError:
        raise DataError(f"file {value} is damaged") from None


def die(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value
