"""Commands that a result suggests, as lines to paste: the program as this process runs it, and the next steps."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from exporter.distribution import PROGRAM
from exporter.model.embedded.example import PICTURE, QUESTION

MOST = 2  # next steps of a command that is no export
NO_VLLM = "vLLM, which serves it, is not installed here (`{} doctor` shows how to install it); then:"
NO_KERNEL = "vLLM serves it on a GPU, but has no kernel for it on this CPU; for this CPU export with another recipe:"


def program() -> str:
    """Shell text that runs this program again: `mmq` where PATH finds it, else its path or the module."""
    running = Path(sys.argv[0])
    on_path = shutil.which(PROGRAM)
    if on_path and (running.stem != PROGRAM or Path(on_path).resolve() == running.resolve()):
        return PROGRAM
    if running.stem == PROGRAM and running.is_file():
        return shlex.quote(short_path(running))
    return f"{shlex.quote(short_path(Path(sys.executable)))} -m exporter"


def short_path(path: Path) -> str:
    """The path, relative if it is below the working folder; links are kept, because a venv's python is one."""
    absolute = Path(os.path.abspath(path))
    return os.path.relpath(absolute) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def command(*words: str | Path) -> str:
    """Shell text of an mmq command."""
    return f"{program()} {shlex.join(map(str, words))}"


def named(text: str) -> str:
    """The text with the running program in place of `mmq` in its commands."""
    return text.replace("`mmq ", f"`{program()} ")


def print_steps(as_json: bool, steps: Sequence[str], err: bool = False) -> None:
    """Print shell texts as the next steps, at most two; nothing with --json. err: on stderr; stdout is an answer."""
    if steps and not as_json:
        click.echo("\n".join(["next:", *(f"  {step}" for step in steps[:MOST])]), err=err)


def has_vllm() -> bool:
    """Whether `mmq serve` finds a program: MMQ_VLLM is set, or `vllm` is on PATH."""
    return bool(os.environ.get("MMQ_VLLM") or shutil.which("vllm"))


def next_steps(
    artifact: Path, unserved: str = "", answers: bool = True, other: Sequence[str] | None = None
) -> list[str]:
    """Lines to paste after an export: report, a question, then serve and check.

    unserved: why vLLM does not serve the artifact. answers: whether the model answers questions. other: words of an
    export that vLLM serves on this machine, if it does not serve this one.
    """
    lines = ["next:", f"  {command('report', artifact)}"]
    if answers:
        lines.append(f"  {command('ask', artifact, PICTURE, QUESTION)}")
    if unserved:
        return [*lines, unserved]
    if other is not None:
        return [*lines, NO_KERNEL, *([f"  {command(*other)}"] if other else [])]
    lines += [] if has_vllm() else [NO_VLLM.format(program())]
    return [*lines, *(f"  {command(name, artifact)}" for name in ("serve", "check"))]
