"""The machine as mmq sees it."""

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
    """Label -> finding; never raises."""
    from huggingface_hub.constants import HF_HUB_CACHE

    device = choose("auto")
    found = {"distribution": DISTRIBUTION, "python": platform.python_version(), "system": platform.platform()}
    found |= {name: installed_version(name) or "MISSING" for name in CORE}
    found |= {name: installed_version(name) or f"not installed ({why})" for name, why in OPTIONAL.items()}
    found["device"] = f"{device.name}, {device.free_bytes / 2**30:.1f} GiB free"
    found["host memory free"] = f"{free_host_bytes() / 2**30:.1f} GiB"
    found["disk free here"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"
    found["hub cache"] = f"{HF_HUB_CACHE}{'' if Path(HF_HUB_CACHE).is_dir() else ' (empty)'}"
    return found
