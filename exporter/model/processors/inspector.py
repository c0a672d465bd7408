"""Inspects a model folder's processor in a helper process with limits on time and memory.

Tokenizers, templates and processor settings are untrusted files, and the libraries that read them can abort, loop
forever or exhaust memory. The helper (`inspector_process`) loads them first; this process loads only what the helper
has loaded.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from exporter.distribution import install_extra
from exporter.errors import CheckpointError
from exporter.model.embedded import MODELS
from exporter.model.processors.chat_template import Template, parse_template
from exporter.model.processors.files import PATTERNS, missing_files
from exporter.model.processors.inspection_cache import has_reply, keep, recall

HIDDEN = ("torch", "torchvision", "sklearn", "pandas", "scipy")  # slow imports that processors rarely need
WAIT_SECONDS = 300  # for a reply on a busy machine; the helper itself limits its processor time
HINT = "the folder needs preprocessor_config.json, tokenizer.json and tokenizer_config.json next to the weights"
COPY = "copy the missing files from the model's repository: those that were saved with these weights"


@dataclass(frozen=True)
class Inspection:
    """The properties of a processor.

    template: None when it has none. tokens: ids of one picture with a prompt. pixels: shape of the vision tower's input
    for the picture. fields: the requested settings. failure: why it cannot encode the picture with the prompt; empty
    when it can. padded: ids of padded prompts. beyond: tokens, with their ids, for which the model has no embedding.
    typical: number of image tokens of a picture of 640 x 480 pixels; None when it was not requested.
    start: the tokenizer's start token and its id; None when it has none, or when it is also the end token.
    added: the tokens, as text, that the tokenizer puts before every text; empty when there are none.
    """

    template: Template | None
    tokens: tuple[int, ...] = ()
    pixels: tuple[int, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""
    padded: tuple[tuple[int, ...], ...] = ()
    beyond: tuple[tuple[str, int], ...] = ()
    typical: int | None = None
    start: tuple[str, int] | None = None
    added: str = ""


_helpers: dict[tuple[str, ...], "Helper"] = {}  # hidden packages -> the running helper
_starting = threading.Lock()


class HelperDied(Exception):
    """The helper process ended or did not reply; the message describes how."""


class Helper:
    """One helper process, restarted when it has died."""

    def __init__(self, hidden: Sequence[str]) -> None:
        self._hidden = hidden
        self._lock = threading.Lock()
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        root = str(Path(__file__).resolve().parents[3])
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]])}
        command = [sys.executable, "-m", "exporter.model.processors.inspector_process", *self._hidden]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The helper's reply. HelperDied when there is none; the next request starts a new helper."""
        with self._lock:
            if self._process.poll() is not None:
                self.close()
                self._process = self._start()
            process = self._process
            try:
                line = self._exchange(process, json.dumps(request).encode() + b"\n")
            except BaseException:
                self.close()
                raise
            reply: dict[str, Any] = json.loads(line)
            return reply

    def _exchange(self, process: "subprocess.Popen[bytes]", line: bytes) -> bytes:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            raise HelperDied(_end(process)) from None
        if not select.select([process.stdout], [], [], WAIT_SECONDS)[0]:
            raise HelperDied(f"no answer within {WAIT_SECONDS} s")
        reply = process.stdout.readline()
        if not reply.endswith(b"\n"):
            raise HelperDied(_end(process))
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(BrokenPipeError):  # raised by a request that the helper has not read
                    stream.close()


def _end(process: "subprocess.Popen[bytes]") -> str:
    """A description of how a process ended."""
    code = process.wait()
    if code == -24 or code == -26:  # SIGXCPU, SIGVTALRM
        return "the libraries exceeded the time limit"
    if code < 0:
        return f"signal {-code} ended the libraries" + (" (possibly out of memory)" if code == -9 else "")
    return f"the helper process ended with code {code}"


def helper(hidden: tuple[str, ...] = HIDDEN) -> Helper:
    """The helper of this process, started on first use and ended with this process."""
    with _starting:
        if hidden not in _helpers:
            _helpers[hidden] = Helper(hidden)
            atexit.register(_helpers[hidden].close)
        return _helpers[hidden]


def start_helper(model: str | None = None) -> None:
    """Start the helper now, so that it loads its libraries while this process does something else.

    It is not started for a `model` (an embedded name or a folder) whose replies are in the cache.
    """
    folder = None if model is None else MODELS.get(model, Path(model).expanduser())
    with suppress(CheckpointError, OSError):  # opening the model reports what is wrong with its files
        if folder and folder.is_dir() and _state(folder) and has_reply(folder):
            return
    helper()


def has_processor(folder: Path) -> bool:
    """Whether a folder has the settings of a processor."""
    return any(folder.glob("*processor*.json"))


def refuse_incomplete(folder: Path) -> None:
    """CheckpointError with the missing files unless the folder has those of a processor."""
    if missing := missing_files(folder):
        raise CheckpointError(f"{folder}: the folder has no processor: it lacks {' and '.join(missing)}", COPY)


def inspect(folder: Path, **request: Any) -> Inspection:
    """The properties of the processor in `folder`; CheckpointError with the file and the reason when it cannot be used.

    request: `text`, `fallback`, `fields` and `rows`, see `inspector_process.inspect`.
    """
    refuse_incomplete(folder)
    return _inspect(folder, _state(folder), json.dumps(request, sort_keys=True))


@cache
def _inspect(folder: Path, state: str, question: str) -> Inspection:
    request = {"folder": str(folder.resolve()), "state": state, **json.loads(question)}
    reply = recall(folder, question)
    if reply is None:
        reply = _ask(folder, request)
        if needs_hidden(reply):
            reply = _ask(folder, request, ())
        if "error" in reply:
            raise _refusal(folder, reply)
        if "failure" not in reply and _state(folder) == state:
            keep(folder, question, reply)
    template = None if reply["rendered"] is None else parse_template(reply["rendered"], str(folder))
    tokens, pixels = tuple(reply.get("tokens", ())), tuple(reply.get("pixels", ()))
    padded = tuple(map(tuple, reply.get("padded", ())))
    beyond = tuple((token, number) for token, number in reply["beyond"])
    start = tuple(reply["start"]) if reply["start"] else None
    failure, typical = reply.get("failure", ""), reply.get("typical")
    return Inspection(
        template, tokens, pixels, reply["fields"], failure, padded, beyond, typical, start, reply.get("added", "")
    )


def check_config_class(name: str, config: Mapping[str, Any], where: str, folder: Path) -> None:
    """CheckpointError unless transformers' config class `name` takes a config.json.

    where: its model, for messages. folder: of the model, if it is a local folder.
    """
    request = {"config_class": name, "config": config}
    question = json.dumps(request, sort_keys=True)
    if folder.is_dir() and _state(folder) and recall(folder, question) is not None:
        return
    try:
        reply = helper().ask(request)
        if needs_hidden(reply):
            reply = helper(()).ask(request)
    except HelperDied as death:
        reply = {"reason": str(death), "error": "HelperDied"}
    if "error" in reply:
        raise CheckpointError(f"{where}: transformers cannot read its config.json: {reply['reason']}")
    if folder.is_dir():
        keep(folder, question, reply)


def needs_hidden(reply: Mapping[str, Any]) -> bool:
    """Whether a processor failed because a package was hidden from it."""
    reason = reply.get("reason", "") + reply.get("failure", "")
    return "ImportError" in reason or any(name in reason.lower() for name in ("torch", "sklearn", "scipy"))


def _ask(folder: Path, request: Mapping[str, Any], hidden: tuple[str, ...] = HIDDEN) -> dict[str, Any]:
    try:
        return helper(hidden).ask(request)
    except HelperDied as death:
        raise CheckpointError(f"{folder}: its processor cannot be used: {death}", "download its files again") from None


def _state(folder: Path) -> str:
    """A text that changes when a file of the processor changes."""
    paths = sorted({path for pattern in (*PATTERNS, "config.json") for path in folder.glob(pattern)})
    if special := [path for path in paths if not path.is_file()]:  # reading a pipe might never end
        raise CheckpointError(f"{special[0]}: not a regular file", HINT)
    return json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths])


_STEPS = {
    "load": "its processor cannot be loaded",
    "tokenizer": "its tokenizer cannot encode and decode texts",
    "template": "its chat template cannot be used",
    "encode": "its processor cannot encode a picture with a prompt",
}


_HINTS = {
    "load": HINT,
    "tokenizer": "use the tokenizer that was saved with these weights",
    "template": "correct the template, or delete it: mmq then uses its own prompts",
}


def _refusal(folder: Path, reply: Mapping[str, Any]) -> CheckpointError:
    where = folder / reply["file"] if reply["file"] else folder
    hint = _HINTS[reply["step"]]
    if reply["error"] == "ImportError":
        needs_torchvision = "torchvision" in reply["reason"].lower()
        hint = install_extra("pixtral") if needs_torchvision else "install the named package"
    return CheckpointError(f"{where}: {_STEPS[reply['step']]}: {reply['reason']}", hint)
