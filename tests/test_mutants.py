"""Mutants: what is changed and what is not, and which tests run against a mutant."""

import ast

import pytest

from bench.line_tests import MAX_SECONDS, LineTests
from bench.mutate import PACKAGE, modules, rooms, sampled
from bench.mutation_operators import mutated, sites


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
        ("def tiny_config():\n    return 1", []),
        ("assert a == 1", []),
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


def test_the_fastest_tests_of_each_file_that_run_the_statement_are_selected() -> None:
    source = (PACKAGE / "numerics" / "hessian.py").read_text().splitlines()
    number = next(i for i, line in enumerate(source, 1) if "self.hessian.mul_(" in line)
    tests = {"tests/a.py::slow": 30.0, "tests/a.py::fast": 1.0, "tests/b.py::other": 2.0, "tests/b.py::never": 1.0}
    record = LineTests(tests, {"numerics/hessian": {1: frozenset(tests), number: frozenset(list(tests)[:3])}})
    assert record.select("numerics/hessian", number) == ["tests/a.py::fast", "tests/b.py::other", "tests/a.py::slow"]
    slow = LineTests(dict.fromkeys(tests, 30.0), record.lines)
    assert len(slow.select("numerics/hessian", number)) == int(MAX_SECONDS // 30)


def test_a_sample_is_the_seeds_alone() -> None:
    assert sampled("methods", 20, 0) == sampled("methods", 20, 0) != sampled("methods", 20, 1)
    assert len(set(sampled("methods", 20, 0))) == 20
    whole = sampled("numerics", 10**6, 0)
    assert len(whole) == len(set(whole)) > 300
    for mutant in sampled("formats", 30, 2):
        compile(mutated(mutant.path.read_text(), mutant.number), "mutant", "exec")
