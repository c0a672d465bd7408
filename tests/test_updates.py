"""`mmq evaluate` and `mmq check` update one artifact's report at once: neither result is lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

from exporter.artifact.manifest import read_manifest
from exporter.evaluation import evaluate
from exporter.evaluation.report_file import read_report
from exporter.serving import check
from exporter.serving.check import CheckResult
from tests.test_evaluate import crafted
from tests.test_export import quick_export

UPDATES: dict[str, tuple[Any, Callable[[Path], object]]] = {  # command -> its module, and its update of a folder
    "evaluate": (evaluate, lambda folder: evaluate.store_report(folder, crafted(1, 2))),
    "check": (
        check,
        lambda folder: check.store_result(
            folder, CheckResult("0.32.0+cpu", "cpu", 8, 0.015, None, None, {}, (), 30.0, ()), "0" * 64
        ),
    ),
}


def paused(command: str, folder: str) -> None:
    """Run an update that prints a line after it has read the report, and waits for a line before it goes on."""
    module, update = UPDATES[command]

    def read_slowly(place: Path) -> Any:
        content = read_report(place)
        print("read", flush=True)
        input()
        return content

    module.read_report = read_slowly
    print("started", flush=True)
    update(Path(folder))


@contextmanager
def running(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs `paused`."""
    code = f"from tests.test_updates import paused; paused({command!r}, {str(folder)!r})"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "started\n"
            yield process
        finally:
            process.kill()


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a paused process finish."""
    assert process.stdin
    process.stdin.write("\n")
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("updates") / "out"
    quick_export(out, skip_evaluation=True)
    return out


@pytest.mark.parametrize(
    ("first", "second"), [("evaluate", "check"), pytest.param("check", "evaluate", marks=pytest.mark.slow)]
)
def test_the_second_process_waits_for_the_first_and_both_results_are_stored(
    first: str, second: str, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made, folder)
    before = {path.name for path in folder.iterdir()}
    with running(first, folder) as one:
        assert one.stdout
        assert one.stdout.readline() == "read\n"
        with running(second, folder) as other:
            assert other.stdout
            reads_too_early = select([other.stdout], [], [], 1)[0]
            go_on(one)
            assert other.stdout.readline() == "read\n"
            go_on(other)
    assert not reads_too_early
    report, serving = read_report(folder)
    assert report == crafted(1, 2)
    assert serving is not None
    assert serving.passed
    verdict = read_manifest(folder).serving
    assert verdict is not None
    assert verdict.passed
    assert {path.name for path in folder.iterdir()} == before | {"mmq_report.json"}
    assert json.loads((folder / "mmq_report.json").read_text())["serving"]["passed"]
