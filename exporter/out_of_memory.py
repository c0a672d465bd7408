"""Running out of memory: how it is recognized, and the error that says where, how much, and what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from exporter.device import Device, free_bytes, free_host_bytes
from exporter.errors import MemoryShortage

GIB = 2**30
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# What CUDA's libraries, torch's allocator on the CPU and numpy say in errors of other types.
WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "Unable to allocate")
TRIED = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def shortage(
    error: BaseException, step: str, device: Device, needs: tuple[int, int] = (0, 0), advice: str = ""
) -> MemoryShortage:
    """What ran out while `step` ran, as an error for users.

    needs: bytes that the step was predicted to take on the device and on the host (0: not predicted). advice: what to
    do next.
    """
    on_device = device.is_cuda and not isinstance(error, MemoryError | OSError) and "CPUAllocator" not in str(error)
    free = free_bytes(device.torch_device) if on_device else free_host_bytes()
    predicted, tried = needs[0 if on_device else 1], requested_bytes(error)
    parts = [f"{tried / GIB:.2f} GiB more were requested"] if tried else []
    parts += [f"{free / GIB:.2f} GiB are free"]
    parts += [f"the step was predicted to take {predicted / GIB:.2f} GiB"] if predicted else []
    where = device.name if on_device else "the host"
    return MemoryShortage(f"{step}: out of memory on {where}: {', '.join(parts)}", advice or None)


def requested_bytes(error: BaseException) -> int:
    """Bytes of the allocation that failed; 0 when the error does not say."""
    match = TRIED.search(str(error))
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


@contextmanager
def explained(step: str, device: Device, needs: tuple[int, int] = (0, 0), advice: str = "") -> Iterator[None]:
    """Turn running out of memory inside the block into a MemoryShortage (arguments: see `shortage`)."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        raise shortage(error, step, device, needs, advice) from None
