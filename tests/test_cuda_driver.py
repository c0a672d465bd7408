"""GPUs read from the CUDA driver without torch, with a driver made of Python functions."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from exporter import cuda_driver, device
from exporter.errors import PlanError

GIB = 2**30
CUDA_13 = {"cuda": "13.0", "hip": None}


class Driver:
    """Two GPUs with 5 and 70 GiB free. failing: name of a function that fails, and its code."""

    def __init__(self, failing: tuple[str, int] = ("", 0), version: int = 13_010) -> None:
        self.failing = failing
        self.version = version
        self.current = [-1]

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self.failing[0]:
                return self.failing[1]
            getattr(type(self), f"_{name}")(self, *(getattr(value, "_obj", value) for value in arguments))
            return 0

        return call

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDriverGetVersion(self, result: ctypes.c_int) -> None:
        result.value = self.version

    def _cuDeviceGetCount(self, result: ctypes.c_int) -> None:
        result.value = 2

    def _cuDeviceGet(self, result: ctypes.c_int, index: int) -> None:
        result.value = index + 10

    def _cuDeviceGetName(self, name: Any, size: int, gpu: ctypes.c_int) -> None:
        name.value = f"GPU {gpu.value}".encode()[: size - 1]

    def _cuDevicePrimaryCtxRetain(self, context: ctypes.c_void_p, gpu: ctypes.c_int) -> None:
        context.value = gpu.value

    def _cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> None:
        self.current.append(context.value)

    def _cuMemGetInfo_v2(self, free: ctypes.c_size_t, total: ctypes.c_size_t) -> None:
        free.value, total.value = {10: 5 * GIB, 11: 70 * GIB}[self.current[-1]], 80 * GIB

    def _cuCtxPopCurrent_v2(self, context: ctypes.c_void_p) -> None:
        context.value = self.current.pop()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the driver and the build of torch."""

    def install(driver: Driver | OSError, build: dict[str, Any] | None = CUDA_13) -> None:
        def load(name: str) -> Driver:
            assert name == "libcuda.so.1"
            if isinstance(driver, OSError):
                raise driver
            return driver

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(cuda_driver, "_torch_build", lambda: build)
        monkeypatch.setattr(cuda_driver, "_contexts", [])
        monkeypatch.setattr(cuda_driver, "_ahead", [])

    return install


def test_names_and_free_bytes_are_those_of_the_driver(installed: Callable[..., None]) -> None:
    driver = Driver()
    installed(driver)
    assert cuda_driver.gpus() == [("GPU 10", 5 * GIB), ("GPU 11", 70 * GIB)]
    assert driver.current == [-1]  # no context is left current
    assert cuda_driver.has_contexts()


@pytest.mark.parametrize(
    ("driver", "build", "expected"),
    [
        (OSError("no such file"), CUDA_13, []),
        (Driver(("cuInit", cuda_driver.NO_DEVICE)), CUDA_13, []),
        (Driver(), {"cuda": None, "hip": None}, []),  # a build for CPUs
        (Driver(), {"cuda": None, "hip": "6.4"}, None),
        (Driver(), None, None),
        (Driver(("cuInit", 999)), CUDA_13, None),
        (Driver(("cuMemGetInfo_v2", 2)), CUDA_13, None),
        (Driver(version=12_090), CUDA_13, None),
        (Driver(version=13_000), CUDA_13, [("GPU 10", 5 * GIB), ("GPU 11", 70 * GIB)]),
    ],
)
def test_torch_answers_where_the_driver_cannot(
    driver: Driver | OSError, build: dict[str, Any] | None, expected: Any, installed: Callable[..., None]
) -> None:
    installed(driver, build)
    assert cuda_driver.gpus() == expected


def test_a_read_in_the_background_is_used_once_and_reports_errors(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(Driver())
    cuda_driver.start()
    installed_later: Any = [("another", 1)]
    monkeypatch.setattr(cuda_driver, "_read", lambda: installed_later)
    assert cuda_driver.gpus() == [("GPU 10", 5 * GIB), ("GPU 11", 70 * GIB)]
    assert cuda_driver.gpus() == installed_later

    def broken() -> None:
        raise ValueError("broken")

    monkeypatch.setattr(cuda_driver, "_read", broken)
    cuda_driver.start()
    with pytest.raises(ValueError, match="broken"):
        cuda_driver.gpus()


def test_a_device_is_selected_without_torch(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(Driver())
    monkeypatch.delitem(sys.modules, "torch")
    assert device.choose("auto") == device.Device("cuda:1", "GPU 11", 70 * GIB)
    assert device.choose("cuda") == device.Device("cuda:0", "GPU 10", 5 * GIB)
    with pytest.raises(PlanError, match="no device 'cuda:2': torch lists 2 CUDA devices"):
        device.choose("cuda:2")
    installed(OSError("no driver"))
    assert device.choose("auto").place == "cpu"
    assert "torch" not in sys.modules


def test_the_build_of_torch_is_read_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    build = cuda_driver._torch_build()
    assert build is not None
    assert (build["__version__"], build["cuda"]) == (torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(
    "settings", [(2, 1), *(pytest.param(n, marks=pytest.mark.slow) for n in ((), (1,), (1, 2), (99,)))]
)
def test_threads_without_torch_are_those_of_torch(settings: tuple[int, ...]) -> None:
    code = "from exporter.device import cpu_threads; a = cpu_threads(); import torch; print(a, torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name not in device.THREADS}
    environment |= {name: str(value) for name, value in zip(device.THREADS, settings, strict=False)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    without, with_torch = done.stdout.split()
    assert without == with_torch
