"""The machine as mmq sees it."""

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exporter.device import choose, free_host_bytes

CORE = ("mmq", "torch", "transformers", "safetensors", "pydantic", "huggingface-hub")
OPTIONAL = {
    "compressed-tensors": "lets `mmq verify` compare logits with transformers: pip install 'mmq[verify]'",
    "vllm": "serves artifacts: pip install 'mmq[serve]'",
}


def examine() -> dict[str, str]:
    """Label -> finding; never raises."""
    from huggingface_hub.constants import HF_HUB_CACHE

    device = choose("auto")
    found = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: _version(name) or "MISSING" for name in CORE}
    found |= {name: _version(name) or f"not installed ({why})" for name, why in OPTIONAL.items()}
    found["device"] = f"{device.name}, {device.free_bytes / 2**30:.1f} GiB free"
    found["host memory free"] = f"{free_host_bytes() / 2**30:.1f} GiB"
    found["disk free here"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"
    found["hub cache"] = f"{HF_HUB_CACHE}{'' if Path(HF_HUB_CACHE).is_dir() else ' (empty)'}"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
