"""`mmq serve` as a child process, and what clients do with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from exporter.data.tasks.sample import Sample
from exporter.model.families import Family
from exporter.model.inference.openai_client import png
from exporter.model.inference.predict import prompt_text
from exporter.model.source import open_source
from exporter.serving.launch import Launch, Program
from exporter.serving.vllm_engine import Engine, Reply

MMQ = str(Path(sys.executable).with_name("mmq"))
CLIENTS = 8
LONGEST = 8  # tokens of an answer


# vLLM then runs its worker in the engine's process: a process less that imports vLLM for ten seconds. Not what users
# get: `mmq serve` and the export with --serve-check are tested without it.
ONE_PROCESS_LESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def mmq(
    *arguments: str, seconds: float = 600, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command from beginning to end. environment: additional variables."""
    variables = {**os.environ, **(environment or {})}
    return subprocess.run([MMQ, *arguments], capture_output=True, text=True, timeout=seconds, env=variables)


class Served:
    """A running `mmq serve ARTIFACT`; a context manager. ready: what it printed when it was healthy."""

    def __init__(self, folder: Path, program: Program, port: int) -> None:
        self.folder = folder
        self.port = port
        self.log = folder.with_name(f"{folder.name}.log")
        self.family: Family = open_source(str(folder))[1]
        self.ready: dict[str, Any] = {}
        self._command = [MMQ, "serve", str(folder), "--vllm", program.path, "--port", str(port), "--json"]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process and self._process.poll() is None:
            self.interrupt()

    def start(self) -> None:
        """Start it and wait until it says how to ask (which it bounds itself)."""
        with self.log.open("w") as log:
            command = [*self._command, "--wait", "240"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout
        self.ready = json.loads(self._process.stdout.readline() or "{}")
        assert "url" in self.ready, f"{self.ready}\n{self.log.read_text()[-3000:]}"

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        assert self._process
        self._process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self) -> int:
        """The exit code, which must come within a minute."""
        assert self._process
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def kill_server(self) -> None:
        """SIGKILL to vLLM's first process, as the kernel does when memory is short."""
        os.kill(self.ready["pid"], signal.SIGKILL)

    def said(self) -> str:
        """What it printed when it ended."""
        assert self._process
        assert self._process.stdout
        return self._process.stdout.read()

    def ask(self, sample: Sample) -> Reply:
        """The greedy answer."""
        engine = Engine(Launch((), {}, self.ready["url"], self.ready["model"]))
        return engine.ask(prompt_text(self.family, sample), png(sample.image()), LONGEST)

    def together(self, samples: Sequence[Sample]) -> list[str]:
        """Answers of eight clients that ask at once."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            return [reply.text for reply in pool.map(self.ask, samples)]


def alive(group: int) -> list[str]:
    """Running processes of a process group; those that ended and wait for a parent to notice do not count."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, of_group = rest.split()[:3]
            if int(of_group) == group and state not in "ZX":
                pids.append(name)
    return pids
