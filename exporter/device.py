"""The compute device: selection, free memory, peak memory, deterministic math. Only this file names `torch.cuda`."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from exporter.cuda_driver import gpus, has_contexts
from exporter.dtypes import FLOAT32, Dtype
from exporter.errors import PlanError
from exporter.lazy_torch import torch

THREADS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")  # variables from which torch takes its number of threads


@dataclass(frozen=True)
class Device:
    """A selected device.

    place: torch's name for it: `cpu` or `cuda:N`. free_bytes: free memory at the time of selection (host memory for the
    CPU). others: places of further GPUs that share the calibration batches; everything else runs on `torch_device`.
    With others, free_bytes is the smallest of all.
    """

    place: str
    name: str
    free_bytes: int
    others: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[torch.device, ...]:
        """Every device of a calibration, the first one first."""
        return tuple(map(torch.device, (self.place, *self.others)))

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.place.partition(":")[0]

    @property
    def is_cuda(self) -> bool:
        """True on an NVIDIA (or ROCm) GPU."""
        return self.kind == "cuda"

    @property
    def torch_device(self) -> torch.device:
        """torch's own object for it."""
        return torch.device(self.place)

    def compute_dtype(self, stored: Dtype) -> Dtype:
        """Dtype of forward passes: `stored` if it has 16 bits and the device is a GPU, else float32 (CPUs are slow
        with 16 bits).
        """
        return stored if self.is_cuda and stored.itemsize == 2 else FLOAT32


def choose(request: str = "auto") -> Device:
    """Select a device. `auto`: the CUDA device with the most free memory, or the CPU without CUDA.

    request: `auto`, `cpu`, `cuda`, `cuda:N`, or several GPUs that share calibration, as in `cuda:0,cuda:1`. Raises
    PlanError for an unknown name or a device that does not exist.
    """
    if "," in request:
        return _several(request)
    if request == "cpu":
        return Device("cpu", "CPU", free_host_bytes())
    kind, _, index = request.partition(":")
    if request != "auto" and (kind != "cuda" or not (index == "" or index.isdigit())):
        raise PlanError(f"unknown device '{request}'", "use auto, cpu, cuda or cuda:N")
    present = _gpus()
    if request == "auto":
        free_devices = [(free, i) for i, (_, free) in enumerate(present)]
        return choose(f"cuda:{max(free_devices)[1]}" if free_devices else "cpu")
    number = int(index or 0)
    if number >= len(present):
        raise PlanError(f"no device '{request}': torch lists {len(present)} CUDA devices", "use --device auto or cpu")
    return Device(f"cuda:{number}", *present[number])


def _gpus() -> list[tuple[str, int]]:
    """Name and free bytes of every GPU that torch uses. Without torch they are read from the driver, where possible."""
    if "torch" not in sys.modules and (present := gpus()) is not None:
        return present
    cuda = torch.cuda
    return [(cuda.get_device_name(i), cuda.mem_get_info(i)[0]) for i in range(cuda.device_count())]


def cpu_threads() -> int:
    """Number of torch's threads on the CPU: one per physical core, or fewer by an environment variable."""
    if "torch" in sys.modules:
        return torch.get_num_threads()
    limits = [int(text) for name in THREADS if (text := os.environ.get(name, "")).isdigit() and int(text)]
    return min([_physical_cores(), *limits[:1]])


def _physical_cores() -> int:
    """Number of cores on which this process may run, counting two threads of one core once."""
    cores = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as siblings:
                cores.add(siblings.read())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _several(request: str) -> Device:
    """The GPUs of a list such as `cuda:0,cuda:1`, which share calibration."""
    names = [name.strip() for name in request.split(",")]
    if not all(re.fullmatch(r"cuda:\d+", name) for name in names) or len(set(names)) < len(names):
        raise PlanError(f"unknown devices '{request}'", "use different GPUs, as in cuda:0,cuda:1")
    devices = [choose(name) for name in names]
    others = tuple(device.place for device in devices[1:])
    name = " + ".join(device.name for device in devices)
    return Device(devices[0].place, name, min(device.free_bytes for device in devices), others)


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one of this thread, so that kernels start on it; does nothing for the CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def capability() -> tuple[int, int] | None:
    """Compute capability (major, minor) of the visible NVIDIA GPUs; None if there are none or they differ.

    Reads it from nvidia-smi, because torch would hold GPU memory while a server runs on the same GPU.
    """
    rows = re.findall(r"(?m)^(\d+)\.(\d+)\s*$", _queried("compute_cap"))
    capabilities = {(int(major), int(minor)) for major, minor in rows}
    return capabilities.pop() if len(capabilities) == 1 else None


def driver() -> str | None:
    """Version of the NVIDIA driver; None without visible GPUs."""
    versions = re.findall(r"(?m)^\d+(?:\.\d+)+\s*$", _queried("driver_version"))
    return versions[0].strip() if versions else None


def _queried(field: str) -> str:
    """Output of nvidia-smi for one field of the visible GPUs, one line each; empty if it does not work."""
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if program is None or visible_devices == "":
        return ""
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    command += ["-i", visible_devices] if visible_devices else []
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def free_host_bytes() -> int:
    """Available host memory in bytes: MemAvailable, bounded by the limits of the container and of this process."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return min(free, _container_room(), _process_room())


def _container_room() -> int:
    """Bytes left under the cgroup v2 memory limit; sys.maxsize without a limit."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            limit_bytes = int(limit.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as current:
            return max(0, limit_bytes - int(current.read()))
    except (OSError, ValueError):
        return sys.maxsize


def _process_room() -> int:
    """Bytes left under the limit of this process's address space (`ulimit -v`); sys.maxsize without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm", encoding="ascii") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - used)


@contextmanager
def exact_math(seed: int) -> Iterator[None]:
    """Seed torch and disable TF32 within the context, so that results do not depend on earlier work."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def repeatable_math() -> Iterator[None]:
    """Within the context, backward passes add in a fixed order, so that a resumed run learns the same numbers."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    memory: Any = torch.utils.deterministic  # its types are missing
    filled = memory.fill_uninitialized_memory  # a write to every new tensor, for debugging
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def reset_peak(device: Device) -> None:
    """Start a new measurement of the peak memory of all its GPUs."""
    for gpu in device.all if device.is_cuda else ():
        torch.cuda.reset_peak_memory_stats(gpu)


def peak_bytes(device: Device) -> tuple[int, int]:
    """(peak memory of the fullest GPU since `reset_peak`, peak resident host memory of this process), in bytes."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max((torch.cuda.max_memory_allocated(gpu) for gpu in device.all if device.is_cuda), default=0), host


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can allocate on a device now: free memory plus torch's unused reserve."""
    if device.type != "cuda":
        return free_host_bytes()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def uses_gpu() -> bool:
    """Whether this process has a context on a GPU."""
    return has_contexts() or ("torch" in sys.modules and bool(torch.cuda.is_initialized()))


def empty_caches() -> None:
    """Release torch's unused reserve on all GPUs that this process has used."""
    if uses_gpu():
        torch.cuda.empty_cache()


def release(device: Device) -> None:
    """Release torch's unused reserve if the device is a GPU."""
    if device.is_cuda:
        torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Return freed host memory to the system, because glibc keeps small pieces that many threads freed."""
    with suppress(AttributeError, OSError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: Device) -> None:
    """Wait until the device has finished its queued work, so that timings include it."""
    for gpu in device.all if device.is_cuda else ():
        torch.cuda.synchronize(gpu)
