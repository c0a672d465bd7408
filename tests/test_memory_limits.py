"""Commands in processes whose memory is limited while they work: one error, and finished work is kept."""

import ctypes
import json
import re
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import exporter.data
from exporter.artifact.artifact import Artifact
from exporter.commands import progress
from exporter.commands.main import cli
from exporter.data.tasks.sample import Sample
from exporter.device import Device, choose
from exporter.errors import MemoryShortage
from exporter.events import Event
from exporter.model.processors.processor import load_processor
from exporter.pipeline.serving_check import questions
from exporter.planning.recipe_file import load_recipe
from exporter.serving import check, comparison, cpu_instructions
from exporter.serving.check import EngineRun
from exporter.serving.comparison import CheckSettings, judge
from exporter.serving.launch import Program
from tests.children import running_command
from tests.test_check import exported, replies_of
from tests.test_export import quick_export

LIBC = ctypes.CDLL(None)
LIBC.malloc.argtypes, LIBC.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
LIBC.free.argtypes, LIBC.free.restype = [ctypes.c_void_p], None


def allow(more: int) -> None:
    """Let this process get `more` bytes from now on: no block that it once freed is left to it."""
    kept = LIBC.malloc(more)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    for size in (2**20, 2**16, 2**12, 2**9):
        while LIBC.malloc(size):
            pass
    LIBC.free(kept)


def limit_memory(stage: str, done: int) -> None:
    """From an event of the next command on, this process gets at most a megabyte more."""
    start = progress.ProgressDisplay.__enter__

    def enter(display: progress.ProgressDisplay) -> Callable[[Event], None]:
        listen = start(display)

        def limited(event: Event) -> None:
            listen(event)
            if event.stage == stage and event.done >= done:
                allow(2**20)

        return limited

    progress.ProgressDisplay.__enter__ = enter  # type: ignore[method-assign]


def ended(arguments: Sequence[str], folder: Path, prepare: Callable[[], None]) -> tuple[int, str]:
    """Run a command in another process; the exit code and stderr."""
    with running_command(arguments, folder / "output", prepare) as command:
        return command.ended(), command.stderr.read_text()


def few_candidates() -> None:
    """Retrieval among three pictures, until memory ends."""
    exporter.data.DEMO_CANDIDATES = 3
    limit_memory("evaluate", 8)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("limits") / "itm"
    recipe = load_recipe("blip2-retrieval-w4")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"repo": "demo-blip2-itm"})})
    quick_export(out, recipe=recipe.adjusted(calibration={"samples": 6}))
    return out


def test_retrieval_without_memory_keeps_its_answers_and_resumes(
    retrieval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "evaluate",
        str(retrieval),
        "--eval-samples",
        "16",
        "--eval-batch",
        "8",
        "--device",
        "cpu",
        "--answers",
    ]
    code, stderr = ended([*arguments, str(tmp_path / "kept")], tmp_path, few_candidates)
    assert code == 4, stderr
    error = stderr[stderr.index("Error: ") :]
    sizes = r"([\d.]+ GiB more were requested, )?0\.00 GiB are free, the step was predicted to take 0\.\d\d GiB\n"
    assert re.match(f"Error: evaluate: out of memory on the host: {sizes}", error), error
    hint = f"Hint: answers so far are in {tmp_path / 'kept'}: the same command resumes; use a smaller --eval-batch"
    assert hint in error
    assert "Traceback" not in stderr
    monkeypatch.setattr("exporter.data.DEMO_CANDIDATES", 3)
    resumed = CliRunner().invoke(cli, [*arguments, str(tmp_path / "kept"), "--json"])
    first = next(event for event in map(json.loads, resumed.stderr.splitlines()) if event["stage"] == "evaluate")
    assert first["done"] >= 8
    whole = CliRunner().invoke(cli, [*arguments, str(tmp_path / "whole"), "--json"])
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)


def answered_engine(cpuinfo: Path) -> None:
    """An engine that answers as the reference does, on this CPU; then memory ends."""

    def run(
        folder: Path, artifact: Artifact, samples: Sequence[Sample], session: CheckSettings, log: Path, note: str = ""
    ) -> EngineRun:
        processor = load_processor(folder)
        replies = replies_of(comparison.Reference(artifact, processor, choose("cpu")), artifact, processor, samples)
        session.on_event(Event("answered", 1, 1))
        return EngineRun(replies, {}, (), 1.0)

    check._run_engine = run  # type: ignore[assignment]
    check.scheme_problems = lambda artifact, log: []  # type: ignore[assignment]
    cpu_instructions.CPUINFO = cpuinfo
    limit_memory("answered", 1)


def test_a_reference_without_memory_is_one_error_and_leaves_the_artifact(tmp_path: Path) -> None:
    out, _ = exported(tmp_path / "out", "gptq")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 0.32.0+cpu\n')
    vllm.chmod(0o755)
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f avx512_vnni\n")
    arguments = ["check", str(out), "--vllm", str(vllm), "--device", "cpu", "--questions", "2", "--no-control"]
    code, stderr = ended(arguments, tmp_path, partial(answered_engine, tmp_path / "cpuinfo"))
    assert code == 4, stderr
    assert "note: the reference of the check ran out of memory in float32 on CPU" in stderr
    error = stderr[stderr.index("Error: ") :]
    sizes = r"([\d.]+ GiB more were requested, )?0\.00 GiB are free, the step was predicted to take 0\.00 GiB\n"
    assert re.match(f"Error: the reference of the check: out of memory on the host: {sizes}", error), error
    assert "Hint: the artifact is not affected; close other programs" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("fitting", [1, 2, 0])
def test_the_replies_of_the_engine_are_compared_in_the_memory_that_there_is(
    fitting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine answered for minutes: its replies are not lost when the first placement does not fit."""
    out, _ = exported(tmp_path / "out", "gptq")
    artifact, processor, cpu = Artifact.open(out), load_processor(out), choose("cpu")
    samples = questions(out, (), 2)
    replies = replies_of(comparison.Reference(artifact, processor, cpu), artifact, processor, samples)
    another = Device("cpu", "a larger CPU", cpu.free_bytes)
    placements = [(cpu, torch.float32), (cpu, torch.bfloat16), (another, torch.float32)]
    tried: list[Any] = []

    class Full(comparison.Reference):
        def __init__(self, *arguments: Any) -> None:
            tried.append(arguments[4])
            if fitting == 0 or len(tried) <= fitting:
                raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB")
            super().__init__(*arguments)

    monkeypatch.setattr(comparison, "Reference", Full)
    monkeypatch.setattr(comparison, "reference_placements", lambda artifact, device: placements)
    received: list[Event] = []
    session = CheckSettings(Program("vllm", "0.32.0+cpu", cpu=True), cpu, received.append)
    if fitting:
        compared, _, problems = judge(artifact, samples, replies, None, processor, session)
        assert compared is not None
        assert problems == []
    else:
        with pytest.raises(MemoryShortage, match=r"^the reference of the check: .* 2\.50 GiB more were requested"):
            judge(artifact, samples, replies, None, processor, session)
    assert tried == placements[: fitting + 1 if fitting else 3]
    assert [event.message for event in received][:1] == [
        "the reference of the check ran out of memory in float32 on CPU: mmq tries it with less"
    ]
