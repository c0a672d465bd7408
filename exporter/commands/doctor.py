"""Report of the machine for `mmq doctor`: package versions, device, free memory and disk, hub cache."""

import platform
import shutil
from pathlib import Path

from exporter.device import choose, free_host_bytes
from exporter.distribution import DISTRIBUTION, PROGRAM, install_extra, installed_version

CORE = (PROGRAM, "torch", "transformers", "safetensors", "pydantic", "huggingface-hub")
OPTIONAL = {
    "compressed-tensors": f"`mmq verify` then compares logits with transformers: {install_extra('verify')}",
    "vllm": f"it serves artifacts: {install_extra('serve')}, in an environment without `verify`",
}


def examine() -> dict[str, str]:
    """Report as label -> value. Does not raise when a package is missing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    device = choose("auto")
    report = {"distribution": DISTRIBUTION, "python": platform.python_version(), "system": platform.platform()}
    report |= {name: installed_version(name) or "MISSING" for name in CORE}
    report |= {name: installed_version(name) or f"not installed ({why})" for name, why in OPTIONAL.items()}
    report["device"] = f"{device.name}, {device.free_bytes / 2**30:.1f} GiB free"
    report["host memory free"] = f"{free_host_bytes() / 2**30:.1f} GiB"
    report["disk free here"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"
    report["hub cache"] = f"{HF_HUB_CACHE}{'' if Path(HF_HUB_CACHE).is_dir() else ' (empty)'}"
    return report
