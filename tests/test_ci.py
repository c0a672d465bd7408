"""`.ci/run` with a stand-in for make: nothing that fails goes unnoticed, and nothing else is left out for it."""

import os
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / ".ci" / "run"
MAKE = """#!/bin/bash
echo "make $*"
[ "$1" != "$BROKEN" ] || { echo "$1 broke"; exit 3; }
"""


def run(tmp_path: Path, broken: str = "", **more: str) -> tuple[int, list[str], str]:
    """Exit code, the targets that were made, and what was said of trouble."""
    make = tmp_path / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "MMQ_CI_VLLM"}
    environment |= {"PATH": path, "BROKEN": broken, "MMQ_CI_BROWSER": "no", **more}
    done = subprocess.run([str(RUN)], capture_output=True, text=True, env=environment, timeout=60)
    targets = [line.removeprefix("make ") for line in done.stdout.splitlines() if line.startswith("make ")]
    return done.returncode, targets, done.stderr


def test_a_real_vllm_is_tested_by_default(tmp_path: Path) -> None:
    assert run(tmp_path) == (0, ["check", "docs", "test-pages", "test-vllm", "test"], "")


@pytest.mark.parametrize("broken", ["check", "docs", "test-pages", "test-vllm", "test"])
def test_what_fails_fails_the_run_and_the_rest_is_done(tmp_path: Path, broken: str) -> None:
    code, targets, _ = run(tmp_path, broken)
    assert (code, targets) == (3, ["check", "docs", "test-pages", "test-vllm", "test"])


def test_a_vllm_that_cannot_be_installed_fails_the_run(tmp_path: Path) -> None:
    code, targets, output = run(tmp_path, "vllm")
    assert (code, targets) == (1, ["check", "docs", "test-pages", "test"])
    assert "installing vLLM failed" in output
    assert "vllm broke" in output


def test_it_is_skipped_only_on_request(tmp_path: Path) -> None:
    code, targets, output = run(tmp_path, MMQ_CI_VLLM="no")
    assert (code, targets) == (0, ["check", "docs", "test-pages", "test"])
    assert "skipped the tests with vLLM" in output


@pytest.mark.parametrize("broken", ["", "test", "mutations"])
def test_nightly_runs_all_that_ci_leaves_out(tmp_path: Path, broken: str) -> None:
    """Every target runs, and one that fails fails it."""
    make = tmp_path / "inner"
    make.write_text(MAKE)
    make.chmod(0o755)
    command = ["make", "--no-print-directory", "-C", str(RUN.parent.parent), "nightly", f"MAKE={make}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"BROKEN": broken}, timeout=60)
    targets = [line for line in done.stdout.splitlines() if line.startswith("make ")]
    assert targets == ["make test SELECT=", "make test-vllm SELECT=", "make mutations"]
    assert done.returncode == (2 if broken else 0)
