"""Out-of-memory errors: recognize them, and raise a MemoryShortage that states the device, the bytes and advice."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from exporter.device import Device, free_bytes, free_host_bytes
from exporter.errors import MemoryShortage

GIB = 2**30
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Parts of the messages of CUDA's libraries, torch's CPU allocator and numpy, which raise errors of other types.
MESSAGE_PARTS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "Unable to allocate")
REQUEST = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)


def is_shortage(error: BaseException) -> bool:
    """Whether `error` reports that a GPU or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(part in str(error) for part in MESSAGE_PARTS)


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
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        raise shortage(error, step, device, needs, advice) from None
