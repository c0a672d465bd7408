"""Commands in processes whose memory is limited while they work: one error, and finished work is kept."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from exporter.artifact.artifact import Artifact
from exporter.commands.main import cli
from exporter.device import Device, choose
from exporter.errors import MemoryShortage
from exporter.events import Event
from exporter.model.processor import load_processor
from exporter.pipeline.serving_check import questions
from exporter.planning.recipe_file import load_recipe
from exporter.serving import comparison
from exporter.serving.comparison import Session, judge
from exporter.serving.launch import Program
from tests.test_check import exported, replies_of
from tests.test_export import quick_export

# Runs a command. {limit}: whether memory ends at an event. The process then gets at most a megabyte more, and the
# allocator asks the system for every tensor.
CHILD = """
import os, resource, sys
from pathlib import Path
from exporter.commands import progress
start = progress.ProgressDisplay.__enter__
def enter(self):
    listen = start(self)
    def limited(event):
        listen(event)
        if {limit}:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, resource.RLIM_INFINITY))
    return limited
progress.ProgressDisplay.__enter__ = enter
{more}
from exporter.__main__ import main
main()
"""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "0"}


def limited(limit: str, arguments: Sequence[str], more: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in another process."""
    code = CHILD.format(limit=limit, more=more)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("limits") / "itm"
    recipe = load_recipe("blip2-retrieval-w4")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"repo": "demo-blip2-itm"})})
    quick_export(out, recipe=recipe.adjusted(calibration={"samples": 6}))
    return out


def test_retrieval_without_memory_keeps_its_answers_and_resumes(retrieval: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(retrieval), "--eval-samples", "40", "--device", "cpu", "--answers"]
    ended = limited("event.stage == 'evaluate' and event.done >= 16", [*arguments, str(tmp_path / "kept")])
    assert ended.returncode == 4, ended.stderr
    error = ended.stderr[ended.stderr.index("Error: ") :]
    sizes = r"([\d.]+ GiB more were requested, )?0\.00 GiB are free, the step was predicted to take 0\.\d\d GiB\n"
    assert re.match(f"Error: evaluate: out of memory on the host: {sizes}", error), error
    hint = f"Hint: answers so far are in {tmp_path / 'kept'}: the same command resumes; use a smaller --eval-batch"
    assert hint in error
    assert "Traceback" not in ended.stderr
    resumed = CliRunner().invoke(cli, [*arguments, str(tmp_path / "kept"), "--json"])
    first = next(event for event in map(json.loads, resumed.stderr.splitlines()) if event["stage"] == "evaluate")
    assert first["done"] >= 16
    whole = CliRunner().invoke(cli, [*arguments, str(tmp_path / "whole"), "--json"])
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)


STAND_IN = """
from exporter.artifact.artifact import Artifact
from exporter.device import choose
from exporter.events import Event
from exporter.serving import check
from exporter.serving.reference import Reference
from exporter.model.processor import load_processor
from tests.test_check import replies_of
def run(folder, artifact, samples, session, log, note=""):
    processor = load_processor(folder)
    replies = replies_of(Reference(artifact, processor, choose("cpu")), artifact, processor, samples)
    session.on_event(Event("answered", 1, 1))
    return check.EngineRun(replies, {}, (), 1.0)
check._run_engine = run
check.scheme_problems = lambda artifact, log: []
"""


def test_a_reference_without_memory_is_one_error_and_leaves_the_artifact(tmp_path: Path) -> None:
    out, _ = exported(tmp_path / "out", "gptq")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 0.32.0+cpu\n')
    vllm.chmod(0o755)
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f\n")
    more = (
        f"{STAND_IN}\nfrom exporter.serving import preflight\npreflight.CPUINFO = Path({str(tmp_path / 'cpuinfo')!r})"
    )
    arguments = ["check", str(out), "--vllm", str(vllm), "--device", "cpu", "--questions", "2", "--no-control"]
    ended = limited("event.stage == 'answered'", arguments, more)
    assert ended.returncode == 4, ended.stderr
    assert "note: the reference of the check ran out of memory in float32 on CPU" in ended.stderr
    error = ended.stderr[ended.stderr.index("Error: ") :]
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
            tried.append(arguments[-1])
            if fitting == 0 or len(tried) <= fitting:
                raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB")
            super().__init__(*arguments)

    monkeypatch.setattr(comparison, "Reference", Full)
    monkeypatch.setattr(comparison, "reference_placements", lambda artifact, device: placements)
    received: list[Event] = []
    session = Session(Program("vllm", "0.32.0+cpu", cpu=True), cpu, received.append)
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
