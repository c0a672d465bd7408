"""Install the vLLM plugin of `vllm_blip2.py` by PYTHONPATH, for a vLLM environment without mmq."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from exporter.errors import ServeError
from exporter.serving.launch import Launch
from exporter.serving.vllm_blip2 import SWITCH, refuse

MODULE = "mmq_vllm_blip2"


def plugin_folder() -> Path:
    """Folder in the user's cache with the plugin as a separate module and its entry point; created once."""
    source = Path(__file__).with_name("vllm_blip2.py").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "mmq" / f"vllm-plugin-{hashlib.sha256(source).hexdigest()[:12]}"
    files = {
        f"{MODULE}.py": source,
        f"{MODULE}-1.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 1\n".encode(),
        f"{MODULE}-1.dist-info/entry_points.txt": f"[vllm.general_plugins]\n{MODULE} = {MODULE}:register\n".encode(),
    }
    for name, content in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_bytes(content)
            temporary.replace(path)
    return folder


def with_plugin(launch: Launch, version: str, environment: Mapping[str, str] = os.environ) -> Launch:
    """Add the plugin to a launch: enable it and add its folder to PYTHONPATH, also where the command sets PYTHONPATH.

    version: version of vLLM (ServeError when the plugin does not support it).
    """
    try:
        refuse(version)
    except RuntimeError as error:
        raise ServeError(str(error), "or use a supported version of vLLM: --vllm PROGRAM") from None
    folder = str(plugin_folder())
    command = [
        f"{word}{os.pathsep}{folder}" if word.startswith("PYTHONPATH=") and i < launch.command.index("serve") else word
        for i, word in enumerate(launch.command)
    ]
    path = os.pathsep.join(part for part in (environment.get("PYTHONPATH"), folder) if part)
    return replace(launch, command=tuple(command), environment={**launch.environment, SWITCH: "1", "PYTHONPATH": path})
