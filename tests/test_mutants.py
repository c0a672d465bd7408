"""Mutants: what is changed and what is not, and which tests run against a mutant."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import mutate
from bench.changed_module import IN_CHILDREN, PACKAGE, ROOT, VARIABLE
from bench.line_tests import MAX_SECONDS, MAX_TESTS, LineTests
from bench.mutate import BOUNDS, EQUIVALENT, Mutant, Trial, modules, require_sound, rooms, sampled
from bench.mutation_operators import Site, mutated, sites


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", ["a <= b"]),
        ("a == b in c", ["a != b in c", "a == b not in c"]),
        ("a + b * c", ["a + b / c", "a - b * c"]),
        ("a += 1", ["a += 2", "a -= 1"]),
        ("a and not b", ["a and b", "a or not b"]),
        ("x = -a", ["x = a"]),
        ("x = True, 0.0, 3", ["x = (False, 0.0, 3)", "x = (True, 1.0, 3)", "x = (True, 0.0, 6)"]),
        ("f(x)", ["pass"]),
        ("if a:\n    pass", ["if not a:\n    pass"]),
        ("x = b if a else c", ["x = b if not a else c"]),
        ("raise Wrong(f'{a + 1}')", ["pass"]),
        (
            "def f(a: int = 1) -> 'b':\n    return a",
            ["def f(a: int=2) -> 'b':\n    return a"] * 1 + ["def f(a: int=1) -> 'b':\n    return None"],
        ),
        ("@f(1)\ndef g():\n    'two'\n    return None", []),
        ("x: Literal[1]", []),
        ("def f():\n    return False", ["def f():\n    return True"]),
        ("def tiny_config():\n    return 1", []),
        ("assert a == 1", []),
        ("_TINY_SIZES = [32]", []),
        ("x = Part(a, {'model_type': 'x', 'size': 32}, tiny={'b': 1}, tiny_processor=f(2))", []),
        ("x = {'model_type': name, 'size': 32}", ["x = {'model_type': name, 'size': 64}"]),
        ("if TYPE_CHECKING:\n    import a", []),
        ("sorted(a, stable=True)", ["pass"]),
    ],
)
def test_every_place_is_changed_once(source: str, expected: list[str]) -> None:
    mutants = [ast.unparse(mutated(source, number)) for number in range(len(sites(source)))]
    assert mutants == expected


def test_every_module_is_in_one_room() -> None:
    listed = [module for room in rooms() for module in modules(room)]
    assert len(listed) == len(set(listed)) > 200
    assert {"methods/gptq", "model/families/parts/text", "errors", "commands/main"} <= set(listed)


def line_of(module: str, part: str) -> int:
    """The first line of a module with `part`."""
    source = (PACKAGE / f"{module}.py").read_text().splitlines()
    return next(i for i, line in enumerate(source, 1) if part in line)


def test_the_fastest_tests_that_run_the_statement_are_selected_and_then_those_of_each_file() -> None:
    number = line_of("numerics/hessian", "self.hessian.mul_(")
    quick = {f"tests/a.py::quick{i}": MAX_SECONDS / 8 for i in range(4)}
    slow = {"tests/a.py::slow": MAX_SECONDS / 7, "tests/a.py::slower": MAX_SECONDS / 6, "tests/b.py::one": MAX_SECONDS}
    tests = {"tests/c.py::never": 1.0} | quick | slow
    record = LineTests(tests, {"numerics/hessian": {1: frozenset(tests), number: frozenset(quick | slow)}})
    assert record.select("numerics/hessian", number) == [*quick, "tests/a.py::slow"]
    many = {f"tests/a.py::{i:03}": 0.01 for i in range(MAX_TESTS + 1)}
    assert len(LineTests(many, {"methods/rtn": {1: frozenset(many)}}).select("methods/rtn", 1)) == MAX_TESTS


def test_a_mutant_that_the_selected_tests_miss_gets_the_others_of_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a branch that one of the slow cases of a table takes, after a line that all of them run."""
    module, number = "numerics/hessian", line_of("numerics/hessian", "self.hessian.mul_(")
    seconds = {f"tests/a.py::{i}": MAX_SECONDS / 2 for i in range(8)}
    lines = {number: frozenset(seconds)}
    mutant = next(m for m in sampled("numerics", 10**6, 0) if (m.module, m.site.line) == (module, number))
    runs: list[list[str]] = []

    def run(mutant: Mutant | None, tests: list[str], folder: Path, name: str, limit: float) -> tuple[int, str]:
        runs.append(list(tests))
        detecting = "tests/a.py::5"
        return (1, detecting) if mutant and detecting in tests else (0, "")

    monkeypatch.setattr(mutate, "run", run)
    trial = Trial(LineTests(seconds, {module: lines}), Path(), time.monotonic() + 60)
    assert trial.detects(0, mutant) == (mutant, "tests/a.py::5")
    first, second, alone = runs
    assert len(first) == 2
    assert not {*first} & {*second}
    assert alone == ["tests/a.py::5"]


def test_a_constant_has_the_tests_of_the_functions_that_read_it() -> None:
    read = line_of("files/safetensors_header", "> min(MAX_HEADER")
    seconds = {"tests/a.py::first_import": 0.1, "tests/a.py::reader": 5.0, "tests/a.py::neighbor": 1.0}
    first, reader, neighbor = (frozenset({test}) for test in seconds)
    constant = line_of("files/safetensors_header", "MAX_HEADER = ")
    record = LineTests(seconds, {"files/safetensors_header": {constant: first, read: reader, read + 5: neighbor}})
    assert record.select("files/safetensors_header", constant) == [
        "tests/a.py::reader",
        "tests/a.py::first_import",
        "tests/a.py::neighbor",
    ]


def test_a_function_that_runs_only_in_child_processes_has_the_tests_of_the_modules_that_start_it() -> None:
    record = LineTests({"tests/a.py::asks": 1.0}, {"model/processors/inspector": {90: frozenset({"tests/a.py::asks"})}})
    for name in ("inspector_process", "tokenizer_check"):  # the second is imported by the first
        module = f"model/processors/{name}"
        assert record.select(module, line_of(module, "    return ")) == ["tests/a.py::asks"]


def test_a_mutant_is_loaded_in_child_processes_too() -> None:
    module = "model/embedded/example"
    number = next(n for n, site in enumerate(sites((PACKAGE / f"{module}.py").read_text())) if "1 becomes" in str(site))
    code = "import inspect, exporter.model.embedded.example as e; print(e.SCENE[1], '2)' in inspect.getsource(e))"
    environment = os.environ | {VARIABLE: f"{module}:{number}", "PYTHONPATH": f"{ROOT}{os.pathsep}{IN_CHILDREN}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2 True\n"  # the source too, from which Triton compiles kernels
    # A helper process runs its module so; without code it would end, and any mutant of it would count as detected.
    command = [sys.executable, "-m", "exporter." + module.replace("/", ".")]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr == ""


def test_equivalent_mutants_are_not_tried_and_their_lines_exist() -> None:
    lines = {}
    for room in rooms():
        for module in modules(room):
            source = (PACKAGE / f"{module}.py").read_text()
            lines |= {(module, i): line for i, line in enumerate(source.splitlines(), 1)}
    for part, _ in EQUIVALENT:
        assert any(part in line for line in lines.values()), part
    for bound in BOUNDS:
        assert any(bound.search(line) for line in lines.values()), bound.pattern
    tried = {(mutant.module, mutant.site) for mutant in sampled("files", 10**6, 0)}
    for line, description, expected in (
        (line_of("files/file_hashes", "READ_BYTES = "), "32 becomes 64", False),
        (line_of("files/safetensors_header", "MAX_HEADER = "), "100 becomes 200", True),
    ):
        module = "files/safetensors_header" if expected else "files/file_hashes"
        assert ((module, Site(line, description)) in tried) is expected


def test_a_sample_is_the_seeds_alone() -> None:
    assert sampled("methods", 20, 0) == sampled("methods", 20, 0) != sampled("methods", 20, 1)
    assert len(set(sampled("methods", 20, 0))) == 20
    whole = sampled("numerics", 10**6, 0)
    assert len(whole) == len(set(whole)) > 300
    for mutant in sampled("formats", 30, 2):
        compile(mutated(mutant.path.read_text(), mutant.number), "mutant", "exec")


def test_nothing_is_measured_where_tests_fail_without_a_mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that cannot start ends like one in which a mutant was detected."""
    tried: list[Any] = []
    answers = [(0, ""), (-1, "the process ended"), (5, "")]
    monkeypatch.setattr(mutate, "run", lambda *arguments: tried.append(arguments[:2]) or answers.pop(0))
    record = LineTests({"tests/a.py::slow": 2.0, "tests/a.py::fast": 0.5}, {})
    require_sound(record, tmp_path)
    assert tried == [(None, ["tests/a.py::fast"])]
    for reason in ("the process ended", "exit code 5"):
        with pytest.raises(SystemExit, match=f"fast does not pass without a mutant: {reason}"):
            require_sound(record, tmp_path)
