"""Child processes that start at once: a fork server has imported `tests.preloaded`, and has no thread of torch.

`os.fork` in the test's own process would copy the locks of torch's threads without the threads that release them; a new
interpreter takes seconds to import torch and transformers.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from exporter.events import Event

SECONDS = 120.0


def preloaded_context() -> ForkServerContext:
    """The context of multiprocessing whose processes are children of the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def run_killed(function: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Call a function of a module in a child process, which must end by its own SIGKILL. Arguments are pickled."""
    child = preloaded_context().Process(target=_call, args=(function, arguments, options))
    child.start()
    child.join(SECONDS)
    assert child.exitcode == -signal.SIGKILL, f"the child ended with {child.exitcode}"


def killed_after(unit: int, export: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Run `export(..., on_event=listener)` in a child process that SIGKILLs itself once `unit` blocks are finished."""
    run_killed(export, *arguments, on_event=KillAt("quantize", unit), **options)


class KillAt:
    """A listener that kills its own process at the event of `stage` that says `done`."""

    def __init__(self, stage: str, done: int) -> None:
        self.stage = stage
        self.done = done

    def __call__(self, event: Event) -> None:
        if event.stage == self.stage and event.done == self.done and event.message != "resumed":
            os.kill(os.getpid(), signal.SIGKILL)


def _call(function: Callable[..., object], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """In the child: one thread, as tests/conftest.py sets it, so that sums are the same."""
    torch.set_num_threads(1)
    function(*arguments, **options)


class Child:
    """A running child process."""

    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "it goes on"
        return self.process.exitcode


class Listening(Child):
    """A child that talks with the test. test: the test's end of the pipe."""

    def __init__(self, process: ForkServerProcess, test: Connection) -> None:
        super().__init__(process)
        self.test = test

    def heard(self) -> Any:
        """What it sends next."""
        assert self.test.poll(SECONDS), "it sends nothing"
        return self.test.recv()


@contextmanager
def running(function: Callable[..., object], *arguments: Any) -> Iterator[Listening]:
    """`function(CONNECTION, *arguments)` in a child process, which ends with the context."""
    test, child_end = preloaded_context().Pipe()
    process = preloaded_context().Process(target=_call, args=(function, (child_end, *arguments), {}))
    process.start()
    child_end.close()
    try:
        yield Listening(process, test)
    finally:
        process.kill()
        process.join()


class Command(Child):
    """A running `mmq` command. stdout, stderr: the files that take its output."""

    def __init__(self, process: ForkServerProcess, folder: Path) -> None:
        super().__init__(process)
        self.stdout = folder / "stdout"
        self.stderr = folder / "stderr"

    def wait_for(self, text: str) -> None:
        """Return once stderr holds `text`."""
        end = time.monotonic() + SECONDS
        while text not in self.stderr.read_text():
            assert self.process.exitcode is None, f"it ended without '{text}':\n{self.stderr.read_text()[-2000:]}"
            assert time.monotonic() < end, f"no '{text}':\n{self.stderr.read_text()[-2000:]}"
            time.sleep(0.005)

    def ended_by(self, how: signal.Signals) -> int:
        """Send a signal; the exit code (negative: the signal that ended it)."""
        assert self.process.pid is not None
        os.kill(self.process.pid, how)
        return self.ended()


@contextmanager
def running_command(
    arguments: Sequence[str], folder: Path, prepare: Callable[[], None] | None = None
) -> Iterator[Command]:
    """`mmq ARGUMENTS` by the program's own entry point, in a child whose output goes into files of `folder`.

    prepare: called in the child before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = preloaded_context().Process(target=_command, args=(list(arguments), folder, prepare))
    command = Command(process, folder)
    command.stdout.touch()
    command.stderr.touch()
    process.start()
    try:
        yield command
    finally:
        process.kill()
        process.join()


def _command(arguments: list[str], folder: Path, prepare: Callable[[], None] | None) -> None:
    """In the child: descriptors, arguments and signals as a shell gives them."""
    from exporter.__main__ import main

    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["mmq", *arguments]
    torch.set_num_threads(1)
    if prepare:
        prepare()
    main()
