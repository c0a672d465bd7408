"""The compute device: selection, memory and math settings, with stand-ins for GPUs and for files of the system."""

import io
import os
import resource
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exporter import device, errors
from exporter.device import Device, choose
from exporter.dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32
from exporter.errors import EXIT_CODES, PlanError, did_you_mean, one_line, printable, validation_message

GIB = 2**30


class FakeCuda:
    """Three GPUs with 5, 70 and 9 GiB free; records calls."""

    free = (5 * GIB, 70 * GIB, 9 * GIB)

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def device_count(self) -> int:
        return 3

    def get_device_name(self, number: int) -> str:
        return f"GPU {number}"

    def mem_get_info(self, place: Any) -> tuple[int, int]:
        return self.free[getattr(place, "index", place)], 80 * GIB

    def memory_reserved(self, place: torch.device) -> int:
        return 3 * GIB

    def memory_allocated(self, place: torch.device) -> int:
        return GIB

    def max_memory_allocated(self, place: torch.device) -> int:
        return (place.index + 1) * GIB

    def is_initialized(self) -> bool:
        return True

    def device(self, place: torch.device) -> Any:
        self.calls.append(("enter", place.index))
        return warnings.catch_warnings()

    def __getattr__(self, name: str) -> Any:
        return lambda *places: self.calls.append((name, *(place.index for place in places)))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(device, "torch", SimpleNamespace(cuda=fake, device=torch.device, get_num_threads=lambda: 3))
    return fake


def test_the_gpu_with_the_most_free_memory_is_selected(cuda: FakeCuda) -> None:
    assert choose() == choose("auto") == Device("cuda:1", "GPU 1", 70 * GIB)
    assert choose("cuda") == choose("cuda:0") == Device("cuda:0", "GPU 0", 5 * GIB)
    shared = choose("cuda:2, cuda:0")
    assert shared == Device("cuda:2", "GPU 2 + GPU 0", 5 * GIB, ("cuda:0",))
    assert shared.all == (torch.device("cuda:2"), torch.device("cuda:0"))
    assert (shared.kind, shared.is_cuda, shared.torch_device) == ("cuda", True, torch.device("cuda:2"))
    assert choose("cpu").kind == "cpu"
    assert not choose("cpu").is_cuda


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("cuda:x", "unknown device 'cuda:x'"),
        ("cpu:0", "unknown device 'cpu:0'"),
        ("cuda:3", "no device 'cuda:3': torch lists 3 CUDA devices"),
        ("cuda:0,cuda:0", "unknown devices 'cuda:0,cuda:0'"),
        ("cuda:0,cpu", "unknown devices 'cuda:0,cpu'"),
        ("cuda:0,cuda:7", "no device 'cuda:7'"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(request_: str, message: str, cuda: FakeCuda) -> None:
    with pytest.raises(PlanError, match=message):
        choose(request_)


def test_passes_run_in_16_bits_on_a_gpu_alone(cuda: FakeCuda) -> None:
    gpu, cpu = choose("cuda"), choose("cpu")
    assert [gpu.compute_dtype(dtype) for dtype in (FLOAT16, BFLOAT16, FLOAT32)] == [FLOAT16, BFLOAT16, FLOAT32]
    assert {cpu.compute_dtype(dtype) for dtype in (FLOAT16, BFLOAT16, FLOAT32)} == {FLOAT32}


def test_all_gpus_of_a_calibration_are_measured(cuda: FakeCuda) -> None:
    gpus, cpu = choose("cuda:0,cuda:2"), Device("cpu", "CPU", 1)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert device.peak_bytes(gpus)[0] == 3 * GIB
    assert device.peak_bytes(cpu)[0] == 0
    assert host <= device.peak_bytes(cpu)[1] < 2 * host
    for call in (device.reset_peak, device.synchronize, device.release):
        call(gpus)
        call(cpu)
    assert cuda.calls == [
        ("reset_peak_memory_stats", 0),
        ("reset_peak_memory_stats", 2),
        ("synchronize", 0),
        ("synchronize", 2),
        ("empty_cache",),
    ]
    assert device.free_bytes(torch.device("cuda:1")) == 72 * GIB
    assert device.free_bytes(torch.device("cpu")) < 2**50
    with device.current(torch.device("cpu")), device.current(torch.device("cuda:1")):
        assert cuda.calls[-1] == ("enter", 1)
    assert device.uses_gpu()
    device.empty_caches()
    assert cuda.calls[-1] == ("empty_cache",)


def test_a_process_without_torch_uses_no_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(device, "has_contexts", lambda: False)
    device.empty_caches()
    assert not cuda.calls
    monkeypatch.setattr(device, "has_contexts", lambda: True)
    assert device.uses_gpu()


def test_threads_are_torchs_or_those_of_its_variables(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.cpu_threads() == 3
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(device, "_physical_cores", lambda: 6)
    for mkl, omp, threads in (("", "", 6), ("4", "2", 4), ("", "2", 2), ("0", "2", 2), ("x", "9", 6), ("8", "2", 6)):
        monkeypatch.setenv("MKL_NUM_THREADS", mkl)
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        assert device.cpu_threads() == threads


FILES = {
    "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   50 kB\n",
    "/sys/fs/cgroup/memory.max": "40000\n",
    "/sys/fs/cgroup/memory.current": "10000\n",
    "/proc/self/statm": "3 2 1\n",
    "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0,2\n",
    "/sys/devices/system/cpu/cpu2/topology/thread_siblings_list": "0,2\n",
}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of the system, which a test changes; others do not exist. The address space has no limit."""
    content = dict(FILES)

    def opened(path: str, encoding: str) -> io.StringIO:
        if path not in content:
            raise FileNotFoundError(path)
        return io.StringIO(content[path])

    monkeypatch.setattr(device, "open", opened, raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, 0))
    return content


def test_free_memory_is_bounded_by_the_container_and_the_process(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.free_host_bytes() == 30_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert device.free_host_bytes() == 50 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert device.free_host_bytes() == 0
    del files["/sys/fs/cgroup/memory.max"]
    page = resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3 * page + 700, 0))
    assert device.free_host_bytes() == 700
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (page, 0))
    assert device.free_host_bytes() == 0
    del files["/proc/self/statm"]
    assert device.free_host_bytes() == 50 * 1024
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 8, "SC_AVPHYS_PAGES": 100}.get)
    for text in (None, "MemTotal: 9 kB\n"):
        files["/proc/meminfo"] = text or ""
        assert device.free_host_bytes() == 800


def test_two_threads_of_a_core_count_once(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert device._physical_cores() == 3  # the system does not describe 1 and 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert device._physical_cores() == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert device._physical_cores() == 1


@pytest.mark.parametrize(("visible", "words"), [("0,1", ["-i", "0,1"]), (None, []), ("", None)])
def test_visible_gpus_are_asked_for(
    visible: str | None, words: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        assert options["check"]
        if "driver_version" in command[1]:
            raise subprocess.CalledProcessError(9, command)
        return SimpleNamespace(stdout="9.0\n9.0\n")

    monkeypatch.setattr(device.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    assert device.capability() == (None if words is None else (9, 0))
    assert device.driver() is None
    if words is not None:
        assert asked[0] == ["/bin/nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", *words]
    monkeypatch.setattr(subprocess, "run", lambda command, **options: SimpleNamespace(stdout="535.1.2 \n[N/A]\n"))
    assert device.driver() == (None if words is None else "535.1.2")
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.driver() is None


def test_settings_of_exact_math_are_restored() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, True
    state = torch.random.get_rng_state()
    try:
        with device.exact_math(3):
            first = torch.rand(2)
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(5)
        with device.exact_math(3):
            assert torch.equal(torch.rand(2), first)
        with device.exact_math(4):
            assert not torch.equal(torch.rand(2), first)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_settings_of_repeatable_math_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch, because its own function imports a compiler, which takes seconds."""
    memory, settings = SimpleNamespace(fill_uninitialized_memory="before"), {"enabled": False, "warn_only": "before"}
    fake = SimpleNamespace(
        utils=SimpleNamespace(deterministic=memory),
        are_deterministic_algorithms_enabled=lambda: settings["enabled"],
        is_deterministic_algorithms_warn_only_enabled=lambda: settings["warn_only"],
        use_deterministic_algorithms=lambda enabled, warn_only: settings.update(enabled=enabled, warn_only=warn_only),
    )
    monkeypatch.setattr(device, "torch", fake)
    with device.repeatable_math():
        assert settings == {"enabled": True, "warn_only": True}
        assert memory.fill_uninitialized_memory is False
    assert settings == {"enabled": False, "warn_only": "before"}
    assert memory.fill_uninitialized_memory == "before"


@pytest.mark.filterwarnings("error")
def test_repeatable_math_shows_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(utils=SimpleNamespace(deterministic=SimpleNamespace(fill_uninitialized_memory=True)))
    for name in (
        "are_deterministic_algorithms_enabled",
        "is_deterministic_algorithms_warn_only_enabled",
        "use_deterministic_algorithms",
    ):
        setattr(nothing, name, lambda *values, **options: True)
    monkeypatch.setattr(device, "torch", nothing)
    with device.repeatable_math():
        warnings.warn("not deterministic", stacklevel=1)


def test_element_types_are_torchs() -> None:
    for dtype in DTYPES.values():
        assert (dtype.torch.itemsize, dtype.torch.is_floating_point) == (dtype.itemsize, dtype.is_floating_point)
        assert str(dtype.torch) == f"torch.{dtype}"


def test_messages_are_printable() -> None:
    assert printable("a\x1b[1m\ud800\n\tb") == "a\\x1b[1m\\ud800\n\tb"
    assert printable("x" * 499) == "x" * 499
    assert printable("a" * 300 + "b" * 200) == "a" * 200 + "..." + "b" * 50
    assert one_line(" a\n\tb  c ") == "a b c"
    error = errors.MmqError("a\x1b", "b\x1b")
    assert (str(error), error.message, error.hint) == ("a\\x1b", "a\\x1b", "b\\x1b")


def test_the_closest_name_is_suggested() -> None:
    assert did_you_mean("gtpq", ["gptq", "awq", "gptq2"]) == " Did you mean 'gptq'?"
    assert did_you_mean("x", ["gptq"]) == ""
    unknown = {"type": "extra_forbidden", "loc": ("a", "bitz")}
    assert validation_message(unknown, ["bits"], "option") == "unknown option. Did you mean 'bits'? (bits)"
    assert validation_message({"type": "value", "msg": "Value error, too large"}, []) == "too large"


def test_exit_codes_are_those_of_the_errors() -> None:
    assert list(EXIT_CODES) == [0, 1, 2, 3, 4, 5, 130]
    codes = {
        errors.MmqError: 1,
        errors.PlanError: 1,
        errors.GateFailed: 3,
        errors.CheckFailed: 3,
        errors.MemoryShortage: 4,
        errors.GateNotResolved: 5,
        errors.Interrupted: 130,
    }
    assert {kind: kind.exit_code for kind in codes} == codes


@pytest.mark.parametrize("library", ["glibc", "without malloc_trim", "unreadable"])
def test_freed_memory_is_returned_where_the_c_library_can(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def loaded(name: None) -> Any:
        if library == "unreadable":
            raise OSError
        return SimpleNamespace(malloc_trim=kept.append) if library == "glibc" else SimpleNamespace()

    monkeypatch.setattr(device, "ctypes", SimpleNamespace(CDLL=loaded))
    device.return_freed_memory()
    assert kept == ([0] if library == "glibc" else [])
