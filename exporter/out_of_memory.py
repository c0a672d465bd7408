"""Out-of-memory errors: recognize them, and raise a MemoryShortage that states the device, the bytes and advice."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from exporter.device import Device, free_bytes, free_host_bytes
from exporter.errors import MemoryShortage, MmqError

GIB = 2**30
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Parts of the messages of CUDA's libraries, torch's CPU allocator, oneDNN, numpy, safetensors and Python's threads,
# which raise errors of other types.
MESSAGE_PARTS = (
    *("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory", "ALLOC_FAILED"),
    *("Unable to allocate", "could not create a primitive", "can't start new thread", "std::bad_alloc"),
)
REQUEST = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)


def is_shortage(error: BaseException) -> bool:
    """Whether `error` reports that a GPU or the host ran out of memory, or replaced an error that does."""
    return shortage_behind(error) is not None


def shortage_behind(error: BaseException) -> BaseException | None:
    """The out-of-memory error that `error` is, or that it replaced (its cause or context); None when there is none."""
    visited: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in visited:
        if _reports_shortage(current):
            return current
        visited.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def keeping_shortage(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a worker process; MemoryError when one of mmq's errors replaced a lack of memory.

    An error that is sent to another process loses the error that it replaced.
    """
    try:
        return function(*arguments)
    except MmqError as error:
        cause = shortage_behind(error)
        if cause is None:
            raise
        raise MemoryError(str(cause)) from None


def _reports_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without its import
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | SafetensorError) and any(part in str(error) for part in MESSAGE_PARTS)


def shortage(
    error: BaseException, step: str, device: Device, needs: tuple[int, int] = (0, 0), advice: str = ""
) -> MemoryShortage:
    """MemoryShortage for `error`, with the device, the requested, free and predicted bytes.

    needs: predicted bytes of the step on the device and on the host (0: no prediction). advice: the hint.
    """
    on_device = device.is_cuda and not isinstance(error, MemoryError | OSError) and "CPUAllocator" not in str(error)
    free = free_bytes(device.torch_device) if on_device else free_host_bytes()
    predicted, requested = needs[0 if on_device else 1], requested_bytes(error)
    parts = [f"{requested / GIB:.2f} GiB more were requested"] if requested else []
    parts += [f"{free / GIB:.2f} GiB are free"]
    parts += [f"the step was predicted to take {predicted / GIB:.2f} GiB"] if predicted else []
    location = device.name if on_device else "the host"
    if "new thread" in str(error):
        parts = [f"no thread can be started, {parts[-1]}"] if not predicted else ["no thread can be started", *parts]
    return MemoryShortage(f"{step}: out of memory on {location}: {', '.join(parts)}", advice or None)


def requested_bytes(error: BaseException) -> int:
    """Bytes of the failed allocation; 0 if the message does not contain them."""
    match = REQUEST.search(str(error))
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


@contextmanager
def explain_shortage(step: str, device: Device, needs: tuple[int, int] = (0, 0), advice: str = "") -> Iterator[None]:
    """Raise a MemoryShortage for an out-of-memory error within the context; the arguments are those of `shortage`."""
    try:
        yield
    except MemoryShortage:
        raise
    except Exception as error:
        cause = shortage_behind(error)
        if cause is None:
            raise
        raise shortage(cause, step, device, needs, advice) from None
