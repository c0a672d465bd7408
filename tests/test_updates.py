"""`mmq evaluate` and `mmq check` update one artifact's report at once: neither result is lost."""

import json
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact.manifest import read_manifest
from exporter.evaluation import evaluate
from exporter.evaluation.report_file import read_report
from exporter.serving import check
from exporter.serving.check import CheckResult
from tests.children import running
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


def paused(test: Connection, command: str, folder: Path) -> None:
    """Run an update that says when it has read the report, and waits for a word before it goes on."""
    module, update = UPDATES[command]

    def read_slowly(place: Path) -> Any:
        content = read_report(place)
        test.send("read")
        test.recv()
        return content

    module.read_report = read_slowly
    test.send("started")
    update(folder)


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
    with running(paused, first, folder) as one:
        assert [one.heard(), one.heard()] == ["started", "read"]
        with running(paused, second, folder) as other:
            assert other.heard() == "started"
            reads_too_early = other.test.poll(1)
            one.test.send("go on")
            assert one.ended() == 0
            assert other.heard() == "read"
            other.test.send("go on")
            assert other.ended() == 0
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
