"""Mistakes by syntax: what is changed, what is left alone, and that rooms name files that are there."""

import ast

import pytest

from bench.mutate import HERE, ROOMS, sampled
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
        ("x = True, 0.0, 3", ["x = (False, 0.0, 3)", "x = (True, 1.0, 3)", "x = (True, 0.0, 4)"]),
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
    found = [ast.unparse(mutated(source, number)) for number in range(len(sites(source)))]
    assert found == expected


def test_rooms_name_modules_and_tests_that_are_there() -> None:
    for room in ROOMS.values():
        for module, tests in room.items():
            assert (HERE / "exporter" / f"{module}.py").is_file()
            assert tests
            for test in tests:
                file, _, name = test.partition("::")
                assert f"def {name}" in (HERE / "tests" / f"{file}.py").read_text()


def test_a_sample_is_the_seeds_alone() -> None:
    assert sampled("methods", 20, 0) == sampled("methods", 20, 0) != sampled("methods", 20, 1)
    assert len(set(sampled("methods", 20, 0))) == 20
    whole = sampled("formats", 10**6, 0)
    assert len(whole) == len(set(whole)) > 300
    for mutant in sampled("formats", 30, 2):
        compile(mutated(mutant.path.read_text(), mutant.number), "mutant", "exec")
