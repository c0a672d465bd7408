"""A small part of `python -m bench.attack`: damaged inputs end in one error of mmq's own, or work."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from bench.attack import Case, Result, Worker, as_json, attempt, cases, from_log, table
from bench.attack_artifacts import NAME, proven, try_artifact
from bench.attack_kinds import KINDS, Kind
from bench.damage import TEXTS, damaged_bytes, damaged_json
from exporter.errors import CheckpointError

SEED = 1


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_refused_or_work(tmp_path: Path, kind: str) -> None:
    results = [attempt(Case(kind, number, SEED), tmp_path / "a") for number in range(6)]
    assert [result for result in results if result.outcome not in ("refused", "works")] == []


def test_a_mutation_is_decided_by_its_seed(tmp_path: Path) -> None:
    inputs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        KINDS["config"].damage(tmp_path / name, Random("7:config:3"))
        inputs.append(sorted((path.name, path.read_bytes()) for path in (tmp_path / name).rglob("*.json")))
    assert inputs[0] == inputs[1]
    content = {"a": [1, {"b": "c"}], "d": None}
    assert damaged_json(content, Random("x")) == damaged_json(content, Random("x"))
    assert len({damaged_json(content, Random(f"{i}")) for i in range(60)}) > 30
    assert content == {"a": [1, {"b": "c"}], "d": None}
    assert sum(damaged_bytes(b"x" * 99, Random(f"{i}")) != b"x" * 99 for i in range(60)) > 40
    assert any(damaged_json({}, Random(f"{i}")) in TEXTS for i in range(60))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "works"),
        (CheckpointError("no"), "refused"),
        (CheckpointError(" "), "traceback"),
        (CheckpointError("line\n" * 900), "traceback"),
        (KeyError("x"), "traceback"),
        (RecursionError(), "traceback"),
    ],
)
def test_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, outcome: str) -> None:
    def attempt_nothing(folder: Path, accepted: object) -> None:
        if error:
            raise error

    monkeypatch.setitem(KINDS, "rows", Kind("", 1.0, KINDS["rows"].damage, attempt_nothing))
    assert attempt(Case("rows", 0, 0), tmp_path / "a").outcome == outcome


def test_an_error_after_the_plan_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_and_fail(folder: Path, accepted: object) -> None:
        accepted()  # type: ignore[operator]
        raise CheckpointError("no")

    monkeypatch.setitem(KINDS, "rows", Kind("", 1.0, KINDS["rows"].damage, accept_and_fail))
    assert attempt(Case("rows", 0, 0), tmp_path / "a").outcome == "late"


def test_kinds_share_the_count_and_the_table_counts_them() -> None:
    selected = cases(3000, 0, None)
    assert abs(len(selected) - 3000) < 9
    assert {case.kind for case in selected} == set(KINDS)
    assert cases(9, 5, "config:17") == [Case("config", 17, 5)]
    assert len(cases(9, 0, "config")) == 9
    shown = table([Result(Case("a", 0, 0), "works"), Result(Case("a", 1, 0), "hang"), Result(Case("b", 0, 0), "works")])
    assert "| a |  | 2 | 0 | 1 | 0 | 0 | 1 | 0 |" in shown
    assert "| all |  | 3 | 0 | 2 | 0 | 0 | 1 | 0 |" in shown
    assert "| config | `config.json` | 1 | 0 | 1 |" in table([Result(Case("config", 0, 0), "works")])


def test_a_log_gives_the_table_again(tmp_path: Path) -> None:
    results = [Result(Case("config", 0, 7), "works"), Result(Case("rows", 1, 7), "refused", "no")]
    (tmp_path / "log").write_text("".join(json.dumps(as_json(result)) + "\n" for result in results))
    assert from_log(tmp_path / "log") == results


def test_an_undamaged_artifact_is_accepted(tmp_path: Path) -> None:
    shutil.copytree(proven(), tmp_path / NAME)
    accepted: list[bool] = []
    try_artifact(tmp_path, lambda: accepted.append(True))
    assert accepted


@pytest.mark.parametrize("kind", ["recipe", "layout", "answers", "work", "rows", "picture"])
def test_an_undamaged_file_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Otherwise the attack would count refusals that have nothing to do with the damage."""
    for module in ("bench.attack_files", "bench.attack_kinds"):
        monkeypatch.setattr(f"{module}.damaged_json", lambda content, *rest: json.dumps(content).encode())
        monkeypatch.setattr(f"{module}.damaged_bytes", lambda raw, *rest: raw)
    whole = [attempt(Case(kind, number, SEED), tmp_path / "a") for number in range(8)]
    assert "works" in {result.outcome for result in whole}


def waited(worker: Worker) -> Result:
    """The result of the worker's case."""
    while (result := worker.result()) is None:
        worker.pipe.poll(1)
    return result


def test_a_worker_that_died_after_its_result_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(tmp_path / "w")
    try:
        worker._process.kill()
        worker._process.join()
        worker.submit(Case("header", 0, 0))
        assert waited(worker).outcome in ("refused", "works")
        ended = Worker._start

        def start_and_die(self: Worker) -> None:
            ended(self)
            self._process.kill()
            self._process.join()

        monkeypatch.setattr(Worker, "_start", start_and_die)
        worker._process.kill()
        worker._process.join()
        worker.submit(Case("header", 0, 0))
        assert waited(worker) == Result(Case("header", 0, 0), "died", "exit code -9")
    finally:
        worker.close()
