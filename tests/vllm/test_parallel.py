"""Linears shared by two processes of a real vLLM, on one machine and on two: the answers stay the reference's."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from exporter.planning.recipe import Recipe
from exporter.serving.launch import Program
from exporter.serving.vllm_engine import free_port
from tests.vllm.served import mmq

SHARED = {  # groups of 32: demo-llava's row-parallel linears have inputs for two devices
    "name": "shared",
    "summary": "a model that two devices can share",
    "model": {"repo": "demo-llava", "family": "llava"},
    "quantize": [
        {"component": "vision", "method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"},
        {"component": "language", "method": "rtn", "bits": 4, "group_size": 32},
    ],
    "gates": [{"task": "vqa", "metric": "accuracy", "max_drop": 0.9}],
    "evidence": [{"finding": "a test", "figures": "none", "source": "tests/vllm/test_parallel.py"}],
}


@contextmanager
def second_machine(artifact: Path, program: Program, flags: list[str], log: Path) -> Iterator[None]:
    """What `mmq serve --print` shows, run as it would be on another machine."""
    flags = [*flags, "--node-rank", "1", "--headless"]
    where = ["--vllm", program.path, "--tensor-parallel", "2", "--port", str(free_port())]
    shown = mmq("serve", str(artifact), *where, "--print", "--json", "--", *flags)
    assert shown.returncode == 0, shown.stderr
    printed = json.loads(shown.stdout)
    with log.open("w") as log_file:
        environment = {**os.environ, **printed["environment"]}
        process = subprocess.Popen(
            printed["command"], stdout=log_file, stderr=log_file, env=environment, start_new_session=True
        )
    try:
        yield
    finally:  # it outlives the first machine's engine
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check(artifact: Path, program: Program, logs: Path, *flags: str) -> str:
    """What the engine logged while `mmq check` found that it answers as it should, every linear packed."""
    arguments = [str(artifact), "--vllm", program.path, "--tensor-parallel", "2", "--questions", "8", "--no-control"]
    done = mmq("check", *arguments, "--logs", str(logs), "--json", "--", *flags)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[0])
    assert result["schemes"] == {"CompressedTensorsW8A8Int8": 8, "CompressedTensorsWNA16": 8}
    return (logs / "engine.log").read_text(errors="replace")


@pytest.mark.slow
def test_two_devices_share_linears(exported: Callable[[Recipe], Path], program: Program, tmp_path: Path):
    result = check(exported(Recipe.model_validate(SHARED)), program, tmp_path)
    assert all(f"world_size=2 rank={rank}" in result for rank in (0, 1))


def test_two_machines_share_linears(exported: Callable[[Recipe], Path], program: Program, tmp_path: Path):
    artifact = exported(Recipe.model_validate(SHARED))
    flags = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    log = tmp_path / "second.log"
    with second_machine(artifact, program, flags, log):
        first = check(artifact, program, tmp_path, *flags, "--node-rank", "0")
    second = log.read_text(errors="replace")
    assert "world_size=2 rank=1" in second
    assert "world_size=2 rank=0" in first
    assert "world_size=2 rank=1" not in first


def test_groups_that_two_devices_cannot_share_are_refused(exported: Callable[[Recipe], Path], program: Program):
    rules = [SHARED["quantize"][0], SHARED["quantize"][1] | {"group_size": 128}]
    artifact = exported(Recipe.model_validate(SHARED | {"name": "whole", "quantize": rules}))
    done = mmq("check", str(artifact), "--vllm", program.path, "--tensor-parallel", "2")
    assert done.returncode == 1
    assert "rule tensor-parallel" in done.stderr
