"""The GPUs that torch would use, read from the CUDA driver, because the import of torch takes longer than a plan.

Numbers, names and order are those of torch: its runtime reads them from the same library, which also applies
CUDA_VISIBLE_DEVICES. `mmq plan` reads them in a thread while it loads its own modules.
"""

import ctypes
import runpy
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

LIBRARY = "libcuda.so.1"
NO_DEVICE = 100  # result of `cuInit`
NAME_BYTES = 256
Gpus = list[tuple[str, int]] | None


class _DriverError(Exception):
    """A call of the driver failed; its result is the argument."""


def gpus() -> Gpus:
    """Name and free bytes of every GPU; None when only torch can list them.

    As with torch, every GPU gets a context, which takes some of its memory until the process ends.
    """
    return _ahead.pop().result() if _ahead else _read()


def start() -> None:
    """Read the GPUs in the background; the next call of `gpus` waits for the result.

    The interpreter waits for the thread before it ends, because the driver must not be left while it starts.
    """
    result: Future[Gpus] = Future()
    _ahead.append(result)

    def read() -> None:
        try:
            result.set_result(_read())
        except BaseException as error:  # noqa: BLE001 (`result()` raises it in the waiting thread)
            result.set_exception(error)

    threading.Thread(target=read, name="cuda driver").start()


def has_contexts() -> bool:
    """Whether this process has read GPUs, so that ending it normally would free memory for a while."""
    return bool(_contexts)


_ahead: list[Future[Gpus]] = []
_contexts: list[int] = []  # GPUs on which `_gpu` has created a context


def _read() -> Gpus:
    build = _torch_build()
    if build is None or build.get("hip"):
        return None
    if not build.get("cuda"):
        return []
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return []  # torch has no driver either
    try:
        _call(driver.cuInit, 0)
        if _number(driver.cuDriverGetVersion) // 1000 < int(str(build["cuda"]).partition(".")[0]):
            return None  # too old for this build of torch, whose error explains it
        return [_gpu(driver, i) for i in range(_number(driver.cuDeviceGetCount))]
    except _DriverError as error:
        return [] if error.args == (NO_DEVICE,) else None
    except (AttributeError, ValueError):  # another library of this name
        return None


def _torch_build() -> dict[str, object] | None:
    """The constants of the installed torch's `version.py`, which imports nothing of torch; None if unknown."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        return runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except Exception:  # noqa: BLE001 (a build of unknown origin; torch itself will be asked)
        return None


def _gpu(driver: ctypes.CDLL, index: int) -> tuple[str, int]:
    """Name and free bytes of one GPU."""
    device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(NAME_BYTES)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(driver.cuDeviceGet, ctypes.byref(device), index)
    _call(driver.cuDeviceGetName, name, NAME_BYTES, device)
    _call(driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device)  # the one that torch would use
    _contexts.append(index)
    _call(driver.cuCtxPushCurrent_v2, context)
    try:
        _call(driver.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    return name.value.decode("utf-8", "replace"), free.value


def _number(function: "ctypes._NamedFuncPointer") -> int:
    """Result of a driver function that writes one int."""
    result = ctypes.c_int()
    _call(function, ctypes.byref(result))
    return result.value


def _call(function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
    code = function(*arguments)
    if code:
        raise _DriverError(code)
