"""Run a vLLM server as a child process: start, wait until it is healthy, send requests, read its log, stop.

Requests use HTTP on the address of the `Launch`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from exporter.errors import ServeError
from exporter.model.inference.openai_client import RequestFailed, message, request_json, responds
from exporter.serving.launch import START_SECONDS, Launch

ANSWER_SECONDS = 300.0
STOP_SECONDS = 20.0
SCHEME_LINE = re.compile(r"Using scheme: (\w+) for (\S+)")
KERNEL_LINE = re.compile(r"(?:Using|Selected) (\w+Kernel) for ([A-Z]\w*)")
# transformers' texts about a package that a processor needs: num2words of SmolVLM, and torchvision.
MISSING_PACKAGE = re.compile(r"Package `([\w.-]+)` is required|requires the (\w+) library but it was not found")
# On Linux the kernel sends SIGTERM to the server when this process dies, even by SIGKILL.
DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "parent = int(sys.argv[1])\n"
    "if sys.platform == 'linux':\n"
    "    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)\n"
    "if os.getppid() != parent:\n"
    "    sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True)
class Reply:
    """One answer. prompt: token ids of the prompt, including image tokens. tokens, logprobs: of the answer's tokens.

    top: for every token of the answer, id -> log-probability of the most likely tokens.
    """

    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Mapping[int, float], ...]


class Engine:
    """A running server; use it as a context manager. log: file for its output (None: the stderr of this process)."""

    def __init__(self, launch: Launch, log: Path | None = None, debug: bool = False) -> None:
        self.launch = launch
        self.log = log
        self._debug = debug
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server, also the id of its process group."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server in a new process group without waiting for it; ServeError when its port is in use."""
        refuse_taken_port(self.launch.url)
        environment = {**self.launch.environment, **os.environ}  # variables of the user have precedence
        if "PYTHONPATH" in self.launch.environment:  # this value already includes the user's PYTHONPATH
            environment["PYTHONPATH"] = self.launch.environment["PYTHONPATH"]
        if self._debug:
            environment["VLLM_LOGGING_LEVEL"] = "DEBUG"
        if "VLLM_RPC_BASE_PATH" not in environment:  # vLLM does not delete its sockets
            self._sockets = tempfile.TemporaryDirectory(prefix="mmq-vllm-")
            environment["VLLM_RPC_BASE_PATH"] = self._sockets.name
        self._output = self.log.open("wb") if self.log else None
        command = [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *self.launch.command]
        output = self._output or sys.stderr
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )

    def wait_healthy(self, seconds: float = START_SECONDS) -> float:
        """Wait until the server is healthy and return the seconds; ServeError with the log's end on exit or timeout."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if (code := self.ended()) is not None:
                raise ServeError(f"{ending(code)} before it was ready{self._log_tail()}", self._hint())
            if responds(f"{self.launch.url}/health"):
                return time.monotonic() - start
            time.sleep(0.5)
        raise ServeError(f"vllm was not ready after {seconds:.0f} s{self._log_tail()}")

    def ended(self) -> int | None:
        """Exit code of the server; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self) -> int:
        """Wait until the server exits; return its exit code."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """End the server and its child processes: SIGTERM first, then SIGKILL."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            kill_group(process.pid)
            process.wait()
        if self._output:
            self._output.close()
            self._output = None
        if self._sockets:
            self._sockets.cleanup()
            self._sockets = None

    def kill(self) -> None:
        """Kill the server with SIGKILL, like a crash."""
        kill_group(self.pid)
        assert self._process is not None
        self._process.wait()

    def ask(self, text: str, image: bytes, max_tokens: int = 16, top: int = 5, seed: int = 0) -> Reply:
        """Greedy answer to `text` about `image` (bytes of a PNG or JPEG), with log-probabilities."""
        body = {
            "model": self.launch.model,
            "messages": [message(text, image)],
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": seed,
            "logprobs": True,
            "top_logprobs": top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        try:
            return read_reply(post(f"{self.launch.url}/v1/chat/completions", body))
        except ServeError as error:
            raise ServeError(f"{error.message}{self._log_tail()}") from None

    def schemes(self) -> dict[str, str]:
        """Runtime name -> vLLM's scheme class of every linear, from the log (needs debug and log)."""
        return read_schemes(self.log.read_text(encoding="utf-8", errors="replace")) if self.log else {}

    def kernels(self) -> tuple[str, ...]:
        """Kernels and their schemes, from the log (needs log)."""
        return read_kernels(self.log.read_text(encoding="utf-8", errors="replace")) if self.log else ()

    def _hint(self) -> str | None:
        """What to install when the server ended: what its log misses, or what the model needs if there is no log."""
        program = self.launch.command[0]
        if self.log is None:
            return install_hint(self.launch.packages, program, "this model needs")
        missing = missing_packages(self.log.read_text(encoding="utf-8", errors="replace"))
        return install_hint(missing, program, "it lacks")

    def _log_tail(self) -> str:
        return f"; the end of its log:\n{log_tail(self.log.read_text(errors='replace'))}" if self.log else ""


def ending(code: int) -> str:
    """Description of an exit code of the server."""
    if code >= 0:
        return f"vllm exited with code {code}"
    reason = " (possibly out of memory)" if code == -signal.SIGKILL else ""
    return f"vllm was killed by signal {-code}{reason}"


def kill_group(group: int) -> None:
    """Send SIGKILL to every process of a group; ignore a group without processes."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def refuse_taken_port(url: str) -> None:
    """ServeError when another server listens on this address, because it would answer our requests."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as probe:
        probe.settimeout(2)
        if probe.connect_ex((host.strip("[]"), int(port))) == 0:
            raise ServeError(
                f"port {port} of {host} is in use", "give another port with --port, or --port 0 for any free port"
            )


_reserved_sockets: list[socket.socket] = []  # sockets of `free_port`, open until this process exits


def free_port() -> int:
    """Reserve a free port of the loopback address: the system does not assign it to another process.

    The socket stays bound but does not listen, so a server that sets SO_REUSEADDR, such as vLLM, can use the port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _reserved_sockets.append(holder)
    return int(holder.getsockname()[1])


def post(url: str, body: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> Any:
    """JSON answer to a request; ServeError with the server's message when it refuses or does not answer in time."""
    try:
        return request_json(url, body, seconds)
    except RequestFailed as failed:
        problem = f"answered {failed.status}: {failed.message}" if failed.status else failed.message
        raise ServeError(f"{url}: {problem}") from None


def read_reply(answer: Mapping[str, Any]) -> Reply:
    """Parse a chat completion with token ids and log-probabilities, as `Engine.ask` requests it."""
    try:
        choice = answer["choices"][0]
        steps = choice["logprobs"]["content"]
        return Reply(
            choice["message"]["content"] or "",
            tuple(answer["prompt_token_ids"]),
            tuple(choice["token_ids"]),
            tuple(step["logprob"] for step in steps),
            tuple({_token_id(t["token"]): t["logprob"] for t in step["top_logprobs"]} for step in steps),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ServeError(f"vllm's answer has no token ids or log-probabilities ({error!r})") from None


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def missing_packages(log: str) -> tuple[str, ...]:
    """Packages that a library names in a log as missing, each once."""
    return tuple(dict.fromkeys(name or library.lower() for name, library in MISSING_PACKAGE.findall(log)))


def install_hint(packages: Sequence[str], program: str, reason: str) -> str | None:
    """How to install packages beside a vLLM program; None when there are none."""
    if not packages:
        return None
    names = " ".join(packages)
    return f"{reason} {names} in vLLM's environment, that of {program}: run `pip install {names}` there"


def read_schemes(log: str) -> dict[str, str]:
    """Runtime name -> scheme class, from a log at level DEBUG."""
    return {name: scheme for scheme, name in SCHEME_LINE.findall(log)}


def read_kernels(log: str) -> tuple[str, ...]:
    """`kernel for scheme` lines of a log, each once; the log does not list the kernel of each linear."""
    return tuple(sorted({f"{kernel} for {scheme}" for kernel, scheme in KERNEL_LINE.findall(log)}))


def log_tail(log: str, lines: int = 15) -> str:
    """The last error lines of a log, else its last lines, without the messages of libraries at exit."""
    useful = [line for line in log.splitlines() if line.strip() and not line.startswith((" - ", "nanobind:"))]
    errors = [line for line in useful if re.search(r"\b\w*Error: |\bERROR\b", line)]
    return "\n".join(f"  {line[:400]}" for line in (errors or useful)[-lines:])
