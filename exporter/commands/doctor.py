"""Report of the machine for `mmq doctor`: packages, extras, vLLM, Java, GPU, driver, memory, disk, hub cache.

A missing piece is reported with what does not work without it and how to install it.
"""

import os
import platform
import shutil
from pathlib import Path

from exporter.device import Device, capability, choose, driver, free_host_bytes
from exporter.distribution import DISTRIBUTION, PROGRAM, install_extra, installed_version
from exporter.errors import ServeError

CORE = (PROGRAM, "torch", "transformers", "safetensors", "pydantic", "huggingface-hub")
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {  # extra -> (its packages, what does not work without them)
    "verify": (("compressed-tensors",), "`mmq verify` and exports do not compare block outputs with its reading"),
    "pixtral": (("torchvision",), "the processor of Pixtral does not load; other processors do not need it"),
    "hub": (("datasets",), "no data sets of the hub or of parquet files (`--data hub:...`)"),
    "report": (("matplotlib",), "no PNG plots (`mmq report --plots`); the HTML page works"),
    "study": (("matplotlib", "scikit-learn", "scipy", "shap"), "no importance, allocation and plots of studies"),
    "ray": (("ray",), "no study or evaluation on several machines (`--ray`)"),
}
NO_GPU = "none: exports and evaluation run on the CPU; `mmq plan` shows their time; most kernels of vLLM need a GPU"


def examine() -> dict[str, str]:
    """Report as label -> value. Does not raise when something is missing."""
    device = choose("auto")
    report = {"distribution": DISTRIBUTION, "python": platform.python_version(), "system": platform.platform()}
    report |= {name: installed_version(name) or "MISSING: install mmq again" for name in CORE}
    report |= {f"extra {name}": extra_state(name) for name in EXTRAS}
    report |= {"vllm": vllm_state(), "java": java_state()}
    return report | _hardware(device) | _storage()


def extra_state(name: str) -> str:
    """Versions of an extra's packages; or those that are missing, what that costs, and how to install them."""
    packages, cost = EXTRAS[name]
    versions = {package: installed_version(package) for package in packages}
    result = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    missing = [package for package, version in versions.items() if not version]
    if not missing:
        return result
    return f"missing {', '.join(missing)}: {cost}; {install_extra(name)}" + (f" (has {result})" if result else "")


def vllm_state() -> str:
    """The vLLM that `mmq serve` and `mmq check` would run, where it comes from, and its hardware."""
    from exporter.serving.launch import find_program, installation

    origin = "MMQ_VLLM" if os.environ.get("MMQ_VLLM") else "PATH"
    if origin == "PATH" and shutil.which("vllm") is None:
        return f"missing (neither MMQ_VLLM nor PATH): no `mmq serve`, no `mmq check`; {installation()}"
    try:
        program = find_program()
    except ServeError as error:
        return f"BROKEN ({origin}): {error.message}; {error.hint}"
    build = "CPU build" if program.cpu else "GPU build"
    return f"{program.version}, {build}, {program.path} ({origin})"


def java_state() -> str:
    """Whether Java is installed; no command of mmq uses it."""
    result = shutil.which("java")
    return f"{result or 'missing'}: no command needs it; only the package pycocoevalcap uses it, for METEOR"


def _hardware(device: Device) -> dict[str, str]:
    report = {"device": f"{device.name}, {device.free_bytes / 2**30:.1f} GiB free"}
    major_minor, version = capability(), driver()
    if version:
        kind = (
            f"compute capability {major_minor[0]}.{major_minor[1]}" if major_minor else "several compute capabilities"
        )
        report |= {"gpu": kind, "gpu driver": version}
        if not device.is_cuda:
            report["gpu"] += "; torch does not see it: this torch is a CPU build, or CUDA_VISIBLE_DEVICES hides it"
    elif not device.is_cuda:
        report |= {"gpu": NO_GPU, "gpu driver": "none: no nvidia-smi that works"}
    return report


def _storage() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return {
        "host memory free": f"{free_host_bytes() / 2**30:.1f} GiB",
        "disk free here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "hub cache": f"{HF_HUB_CACHE}{'' if Path(HF_HUB_CACHE).is_dir() else ' (empty)'}",
    }
