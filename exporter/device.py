"""Where the numbers are computed: the only file that may name `torch.cuda`."""

import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from exporter.errors import PlanError


@dataclass(frozen=True)
class Device:
    """A chosen device. free_bytes: memory that was free when it was chosen (host memory for the CPU)."""

    torch_device: torch.device
    name: str
    free_bytes: int

    @property
    def is_cuda(self) -> bool:
        """True on an NVIDIA (or ROCm) GPU."""
        return self.torch_device.type == "cuda"

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Dtype of the forward passes: the checkpoint's own on a GPU, float32 on a CPU (16 bit is slow there)."""
        return stored if self.is_cuda and stored.itemsize == 2 else torch.float32


def choose(request: str = "auto") -> Device:
    """`auto` takes the CUDA device with the most free memory, else the CPU; a named device must exist (PlanError)."""
    if request == "auto":
        found = [(torch.cuda.mem_get_info(i)[0], i) for i in range(torch.cuda.device_count())]
        request = f"cuda:{max(found)[1]}" if found else "cpu"
    if request == "cpu":
        return Device(torch.device("cpu"), "CPU", free_host_bytes())
    kind, _, index = request.partition(":")
    if kind != "cuda" or not (index == "" or index.isdigit()):
        raise PlanError(f"unknown device '{request}'", "use auto, cpu, cuda or cuda:N")
    number, count = int(index or 0), torch.cuda.device_count()
    if number >= count:
        raise PlanError(f"device '{request}' is not here: torch sees {count} CUDA devices", "use --device auto or cpu")
    return Device(torch.device("cuda", number), torch.cuda.get_device_name(number), torch.cuda.mem_get_info(number)[0])


def capability() -> tuple[int, int] | None:
    """Compute capability (major, minor) of the NVIDIA GPUs that programs see here; None without, or if they differ.

    The driver's own program is asked: torch would hold memory on the card for as long as a server runs beside it.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if program is None or seen == "":
        return None
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader", *(["-i", seen] if seen else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = {(int(major), int(minor)) for major, minor in re.findall(r"(?m)^(\d+)\.(\d+)\s*$", done.stdout)}
    return found.pop() if len(found) == 1 else None


def free_host_bytes() -> int:
    """Host memory that programs can still take, in bytes (MemAvailable, bounded by a container's limit)."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return min(free, _container_room())


def _container_room() -> int:
    """Bytes left under a cgroup v2 memory limit; a very large number when there is none."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            most = int(limit.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as current:
            return max(0, most - int(current.read()))
    except (OSError, ValueError):
        return sys.maxsize


@contextmanager
def exact_math(seed: int) -> Iterator[None]:
    """Seed torch and switch TF32 off for the duration, so that results do not depend on what ran before."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def reset_peak(device: Device) -> None:
    """Start a new measurement of the device's peak memory."""
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats(device.torch_device)


def peak_bytes(device: Device) -> tuple[int, int]:
    """(peak device memory since `reset_peak`, peak resident host memory of this process), in bytes."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated(device.torch_device) if device.is_cuda else 0), host


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now: free for everybody, or held in reserve by this process."""
    if device.type != "cuda":
        return free_host_bytes()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def empty_caches() -> None:
    """Give memory back that is held in reserve on GPUs which this process has used."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def release(device: Device) -> None:
    """Give cached device memory back to the system."""
    if device.is_cuda:
        torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Give host memory that was freed back to the system; glibc keeps what many threads freed in pieces."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: Device) -> None:
    """Wait until the device has done its work, for honest timings."""
    if device.is_cuda:
        torch.cuda.synchronize(device.torch_device)
