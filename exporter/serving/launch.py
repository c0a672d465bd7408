"""The `vllm serve` command for an artifact: which flags and environment, and why. Nothing is started here."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ServeError
from exporter.files.strict_json import read_json

TRIED = "0.32.0"  # the release of vLLM that artifacts were served with most
CPU_LENGTH = 4096  # the cache of a CPU engine is host memory
CPU_CACHE_GIB = "1"
OWN = {
    "--host": "--host",
    "--port": "--port",
    "--tensor-parallel-size": "--tensor-parallel",
    "-tp": "--tensor-parallel",
}
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Program:
    """An installed vLLM. cpu: it is the CPU build, which needs settings of its own.

    words: what stands between the program and `serve`, as in `python3 -m vllm.entrypoints.cli.main serve`.
    """

    path: str
    version: str
    cpu: bool
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """What to start. environment: what is added to ours. url: where it listens; model: the name clients use."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    url: str
    model: str

    def shell(self) -> str:
        """The command as a shell takes it, environment first."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


def find_program(request: str | None = None) -> Program:
    """The vLLM at `request`, in MMQ_VLLM or on PATH (ServeError when it is missing or does not run).

    A request of several words is a command that takes `serve` and its flags, for a vLLM without a program of its own:
    `env PYTHONPATH=/site python3 -m vllm.entrypoints.cli.main`.
    """
    wanted = request or os.environ.get("MMQ_VLLM") or "vllm"
    path, words = shutil.which(wanted), []
    if path is None and " " in wanted:
        first, *words = shlex.split(wanted)
        path = shutil.which(first)
    hint = "install vllm in an environment of its own (on a CPU: serving/cpu/install.sh DIR), then --vllm DIR/bin/vllm"
    if path is None:
        raise ServeError(f"no program '{wanted}'", hint)
    found = _version(path, words)
    if found is None:
        raise ServeError(f"{wanted} does not say which version of vllm it is", hint)
    return Program(path, found, "+cpu" in found, tuple(words))


def _version(path: str, words: Sequence[str]) -> str | None:
    """Version of a vllm program: asked of the interpreter behind it, which is quick, else of itself."""
    with open(path, "rb") as file:
        first = file.readline(4096)
    python = [first[2:].strip().decode(errors="replace")] if first.startswith(b"#!") and b"python" in first else None
    if "-m" in words:
        python = [path, *words[: words.index("-m")]]
    quick = [*(python or ()), "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    ask = quick if python else [path, *words, "--version"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = re.findall(r"^v?\d+\.\d+\S*$", done.stdout, re.MULTILINE)
    return words[-1] if done.returncode == 0 and words else None


def launch(
    folder: Path,
    config: Mapping[str, Any],
    program: Program,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    fallback_prompt: str = "",
    tensor_parallel: int = 1,
    extra: Sequence[str] = (),
) -> Launch:
    """The command that serves `folder`. config: its config.json. extra: flags that win (ServeError for `OWN`).

    fallback_prompt: the family's prompt with `{text}`, for a model that brings no chat template.
    """
    given = {word.partition("=")[0].replace("_", "-"): i for i, word in enumerate(extra)}
    if known := [flag for flag in OWN if flag in given]:
        raise ServeError(
            f"{', '.join(known)} behind `--`: mmq asks the server itself, so it must know this",
            f"give it before `--`: mmq serve has {', '.join(dict.fromkeys(OWN[flag] for flag in known))}",
        )
    name = folder.resolve().name
    if "--served-model-name" in given:
        at = given["--served-model-name"]
        name = extra[at].partition("=")[2] or next(iter(extra[at + 1 : at + 2]), name)
    flags = {
        "--host": host,
        "--port": str(port),
        "--served-model-name": name,
        "--dtype": dtype(config, program.cpu),
        "--limit-mm-per-prompt": json.dumps({"image": 1}),  # the families we quantize answer about one image
    }
    length = max_length(config, program.cpu)
    if length:
        flags["--max-model-len"] = str(length)
    if tensor_parallel > 1:
        flags["--tensor-parallel-size"] = str(tensor_parallel)
    template = prompt_template(folder, fallback_prompt)
    if template:
        flags["--chat-template"] = template
    if template and not own_template(folder):
        flags["--chat-template-content-format"] = "string"
    chosen = [word for flag, value in flags.items() if flag not in given for word in (flag, value)]
    environment = dict(QUIET)
    if program.cpu:
        chosen += [] if "--enforce-eager" in given or "--no-enforce-eager" in given else ["--enforce-eager"]
        environment |= {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = (program.path, *program.words, "serve", str(folder.resolve()), *chosen, *extra)
    return Launch(command, environment, f"http://{_reachable(host)}:{port}", name)


def _reachable(host: str) -> str:
    """The address a client on this machine uses for a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def dtype(config: Mapping[str, Any], cpu: bool) -> str:
    """The 16-bit type to compute in: the checkpoint's own, but bfloat16 on a CPU and for float32 checkpoints."""
    stored = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return "float16" if stored == "float16" and not cpu else "bfloat16"


def max_length(config: Mapping[str, Any], cpu: bool) -> int | None:
    """Tokens of image, question and answer: what the language model was made for (None: the engine decides)."""
    length = (config.get("text_config") or {}).get("max_position_embeddings")
    return None if length is None else min(int(length), CPU_LENGTH) if cpu else int(length)


def prompt_template(folder: Path, fallback_prompt: str) -> str | None:
    """The chat template to hand to the engine, None when the model's own does.

    The engine tokenizes what a template renders without special tokens. A tokenizer that starts every text with one
    (Llama's `<s>`) then needs a template that writes it; LLaVA-1.5's does not, so it is put in front.
    """
    own, start = own_template(folder), start_token(folder)
    template = own or (inline_template(fallback_prompt) if fallback_prompt else None)
    if template is None:
        return None
    if start and not _writes(template, start):
        return f"{{{{ {json.dumps(start)} }}}}{template}"
    return None if own else template


def lacks_start(folder: Path) -> bool:
    """Whether a plain `vllm serve` of `folder` asks without the token that every training prompt began with.

    Requests must say `"add_special_tokens": true` then.
    """
    start = start_token(folder)
    return bool(start) and not _writes(own_template(folder) or "", str(start))


def _writes(template: str, start: str) -> bool:
    return start in template or "bos_token" in template


def own_template(folder: Path) -> str | None:
    """The chat template that the model brings, in a file of its own or in its processor's or tokenizer's."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, str) and template:
            return template
    return None


def start_token(folder: Path) -> str | None:
    """The special token that the tokenizer puts before every text, None when it puts none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_file(str(path)).encode("a")
    except Exception as error:  # noqa: BLE001 (the library has no kind of its own)
        raise ServeError(f"{path}: the tokenizer cannot be read: {error}", "export the artifact again") from None
    return str(made.tokens[0]) if made.special_tokens_mask[:1] == [1] else None


def inline_template(prompt: str) -> str:
    """A chat template from a prompt with `{text}`; the engine itself puts the image's place before the text."""
    before, _, after = prompt.replace("<image>\n", "").partition("{text}")
    quoted = [f"{{{{ {json.dumps(part)} }}}}" if part else "" for part in (before, after)]
    return f"{{% for message in messages %}}{quoted[0]}{{{{ message['content'] }}}}{quoted[1]}{{% endfor %}}"
