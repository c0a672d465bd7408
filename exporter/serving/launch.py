"""Build the `vllm serve` command for an artifact: program, flags, environment and chat template."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import ServeError

if TYPE_CHECKING:
    from exporter.model.families import Family

START_SECONDS = 900.0  # enough for a 7B model from a cold disk, with compilation
TESTED_VERSION = "0.32.0"  # the vLLM release with the most tests
CPU_LENGTH = 4096  # tokens; the KV cache of a CPU engine is in host memory
GPU_LENGTH = 2**15  # on a GPU; a picture takes a few thousand tokens, and --max-model-len asks for more
CPU_CACHE_GIB = "1"
MMQ_OPTIONS = {
    "--host": "--host",
    "--port": "--port",
    "--tensor-parallel-size": "--tensor-parallel",
    "-tp": "--tensor-parallel",
}
OFFLINE_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Program:
    """An installed vLLM. cpu: whether it is the CPU build, which needs other settings.

    words: arguments between the program and `serve`, as in `python3 -m vllm.entrypoints.cli.main serve`.
    """

    path: str
    version: str
    cpu: bool
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """Command of a server. environment: additional variables. url: its address. model: its name for clients.

    packages: what the model needs in the server's environment beside vLLM.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    url: str
    model: str
    packages: tuple[str, ...] = ()

    def shell(self) -> str:
        """The command as shell text, with the environment variables first."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


def find_program(request: str | None = None) -> Program:
    """Find vLLM at `request`, in MMQ_VLLM or on PATH (ServeError when it is missing or does not run).

    A request of several words is a command that takes `serve` and its flags, for a vLLM without an executable:
    `env PYTHONPATH=/site python3 -m vllm.entrypoints.cli.main`.
    """
    name = request or os.environ.get("MMQ_VLLM") or "vllm"
    path, words = shutil.which(name), []
    if path is None and " " in name:
        first, *words = shlex.split(name)
        path = shutil.which(first)
    if path is None:
        raise ServeError(f"the program '{name}' does not exist", installation())
    version = _version(path, words)
    if version is None:
        raise ServeError(f"{name} does not print a version of vllm", installation())
    return Program(path, version, "+cpu" in version, tuple(words))


def installation() -> str:
    """How to install vLLM in its own environment; names the script of this installation for a CPU."""
    package = Path(__file__).parent
    inside = package / "cpu" / "install.sh"  # in the wheel; a checkout has it in its folder `serving`
    script = inside if inside.is_file() else package.parent.parent / "serving" / "cpu" / "install.sh"
    return (
        "install vllm in its own environment: on a GPU `python3 -m venv DIR && DIR/bin/pip install "
        f"vllm=={TESTED_VERSION}`, on a CPU `bash {shlex.quote(str(script))} DIR`; then give --vllm DIR/bin/vllm or "
        "set MMQ_VLLM"
    )


def _version(path: str, words: Sequence[str]) -> str | None:
    """Version of a vllm program, from the metadata in its Python interpreter (fast), else from its `--version`."""
    with open(path, "rb") as file:
        first = file.readline(4096)
    python = [first[2:].strip().decode(errors="replace")] if first.startswith(b"#!") and b"python" in first else None
    if "-m" in words:
        python = [path, *words[: words.index("-m")]]
    quick = [*(python or ()), "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    command = quick if python else [path, *words, "--version"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    versions = re.findall(r"^v?\d+\.\d+\S*$", result.stdout, re.MULTILINE)
    return versions[-1] if result.returncode == 0 and versions else None


def launch(
    folder: Path,
    config: Mapping[str, Any],
    program: Program,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    family: "Family | None" = None,
    tensor_parallel: int = 1,
    kv_cache: str | None = None,
    extra: Sequence[str] = (),
) -> Launch:
    """Command that serves `folder`. config: its config.json. extra: vLLM flags that override mmq's flags.

    kv_cache: value of --kv-cache-dtype, of an artifact that names one in its manifest.
    family: decides the chat template of a folder whose own one is not sufficient. ServeError when `extra` has a flag of
    `MMQ_OPTIONS`.
    """
    positions = {word.partition("=")[0].replace("_", "-"): i for i, word in enumerate(extra)}
    if reserved := [flag for flag in MMQ_OPTIONS if flag in positions]:
        raise ServeError(
            f"{', '.join(reserved)} is not allowed after `--`: mmq needs this value to reach the server",
            f"before `--`, give {', '.join(dict.fromkeys(MMQ_OPTIONS[flag] for flag in reserved))} of mmq serve",
        )
    name = folder.resolve().name
    if "--served-model-name" in positions:
        at = positions["--served-model-name"]
        name = extra[at].partition("=")[2] or next(iter(extra[at + 1 : at + 2]), name)
    flags = {
        "--host": host,
        "--port": str(port),
        "--served-model-name": name,
        "--dtype": dtype(config, program.cpu),
        "--limit-mm-per-prompt": json.dumps({"image": 1}),  # all supported families use one image per request
    }
    length = max_length(config, program.cpu)
    if length:
        flags["--max-model-len"] = str(length)
    if tensor_parallel > 1:
        flags["--tensor-parallel-size"] = str(tensor_parallel)
    if kv_cache:
        flags["--kv-cache-dtype"] = kv_cache
    if template := _template(folder, family):
        flags["--chat-template"] = template
    defaults = [word for flag, value in flags.items() if flag not in positions for word in (flag, value)]
    environment = dict(OFFLINE_ENVIRONMENT)
    if program.cpu:
        eager_set = "--enforce-eager" in positions or "--no-enforce-eager" in positions
        defaults += [] if eager_set else ["--enforce-eager"]
        environment |= {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = (program.path, *program.words, "serve", str(folder.resolve()), *defaults, *extra)
    packages = family.engine_packages if family else ()
    return Launch(command, environment, f"http://{_reachable(host)}:{port}", name, packages)


def _template(folder: Path, family: "Family | None") -> str | None:
    from exporter.model.processors.served_template import engine_template  # the help of `mmq serve` needs no family

    return engine_template(folder, family) if family else None


def _reachable(host: str) -> str:
    """Address that a client on this machine uses for a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def dtype(config: Mapping[str, Any], cpu: bool) -> str:
    """The 16-bit dtype for computation: the checkpoint's dtype, but bfloat16 on a CPU and for float32 checkpoints."""
    stored = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return "float16" if stored == "float16" and not cpu else "bfloat16"


def max_length(config: Mapping[str, Any], cpu: bool) -> int | None:
    """Maximum tokens of image, question and answer, from the language model's config (None: engine default).

    The engine reserves cache for one request of this length, so long contexts are limited. Older Qwen files have the
    language model's keys at the top level.
    """
    length = (config.get("text_config") or config).get("max_position_embeddings")
    return None if length is None else min(int(length), CPU_LENGTH if cpu else GPU_LENGTH)
