"""Which tests run a line: a pytest plugin that records it, and the selection of tests for a mutated line.

    python -m pytest -p bench.line_tests -n 2 --dist loadfile

Every worker writes `build/line_tests/WORKER.json`: the seconds of each passed test, and for each module of `exporter`
its lines with the tests (by their number) that ran them. Processes that a test starts are not recorded.
"""

import ast
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "line_tests"
MAX_TESTS = 250  # tests that run against one mutant
MAX_SECONDS = 80.0  # their total time without a mutant


class _Recorder:
    """Pytest plugin: one coverage context for each test."""

    def __init__(self, worker: str) -> None:
        from coverage import Coverage

        self._file = FOLDER / f"{worker}.json"
        self._coverage = Coverage(data_file=None, include=[str(ROOT / "exporter" / "*")], config_file=False)
        self._seconds: dict[str, float] = defaultdict(float)
        self._failed: set[str] = set()
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Attribute the lines that run during a test and its fixtures to the test."""
        self._coverage.switch_context(item.nodeid)
        result = yield
        self._coverage.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record time and outcome."""
        self._seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the records of passed tests."""
        self._coverage.stop()
        data, lines = self._coverage.get_data(), {}
        number = {test: i for i, test in enumerate(self._seconds)}
        passed = number.keys() - self._failed
        for file in data.measured_files():
            module = Path(file).relative_to(ROOT / "exporter").with_suffix("").as_posix()
            by_line = data.contexts_by_lineno(file)
            lines[module] = {line: [number[t] for t in tests if t in passed] for line, tests in by_line.items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"seconds": self._seconds, "lines": lines}))


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder in each worker, or in the only process."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(_Recorder(os.environ.get("PYTEST_XDIST_WORKER", "main")))


@dataclass(frozen=True)
class LineTests:
    """Records of a whole run. seconds: of each test. lines: module -> line -> tests."""

    seconds: Mapping[str, float]
    lines: Mapping[str, Mapping[int, frozenset[str]]]

    @classmethod
    def read(cls) -> "LineTests":
        """Read the files of all workers (FileNotFoundError when there are none)."""
        seconds: dict[str, float] = {}
        lines: dict[str, dict[int, frozenset[str]]] = defaultdict(dict)
        files = sorted(FOLDER.glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{FOLDER} is empty: run `make mutations`, which records the tests of each line")
        for file in files:
            record = json.loads(file.read_text())
            seconds |= record["seconds"]
            names = list(record["seconds"])
            for module, by_line in record["lines"].items():
                for line, tests in by_line.items():
                    lines[module][int(line)] = lines[module].get(int(line), frozenset()) | {names[i] for i in tests}
        return cls(seconds, lines)

    def select(self, module: str, line: int, factor: int = 1) -> list[str]:
        """Tests of the statement at `line`, within `MAX_TESTS` and `MAX_SECONDS`, both multiplied by `factor`.

        The fastest tests come first, for half of the time, because they test units. Then come the fastest of each file.

        A statement in a function: the tests that ran it. Others run at an import, which belongs to no test, and some
        functions run only in child processes, which are not recorded. For these: the tests that ran a statement of the
        package with a name that the statement or its function binds; then the module's tests; then those of the modules
        that import it.
        """
        statement = _statements(module).get(line, Statement(line, line, frozenset(), inside=False))
        tests = self._of(module, range(statement.first, statement.last + 1)) if statement.inside else frozenset()
        groups = [tests] if tests else self._near(module, statement.names)
        selected: dict[str, None] = {}
        total = 0.0
        for group in groups:
            for test in self._ordered(group - selected.keys(), factor * MAX_SECONDS / 2):
                total += self.seconds[test]
                if selected and (len(selected) == factor * MAX_TESTS or total > factor * MAX_SECONDS):
                    return list(selected)
                selected[test] = None
        return list(selected)

    def _ordered(self, tests: Set[str], limit: float) -> list[str]:
        """The fastest tests for `limit` seconds, then the others in turns of files."""
        fastest = sorted(tests, key=lambda test: (self.seconds[test], test))
        ends = accumulate(self.seconds[test] for test in fastest)
        units = sum(end <= limit for end in ends)
        return [*fastest[:units], *_alternating(fastest[units:])]

    def _near(self, module: str, names: frozenset[str]) -> Iterator[frozenset[str]]:
        """Groups of tests for a statement of `module` that no test ran itself; names: those that it binds."""
        uses = _uses()
        users = [self._of(*use) for name in sorted(names) for use in uses.get(name, ())]
        yield frozenset().union(*users)
        visited, reached = {module}, [module]
        while reached:
            yield frozenset().union(*(self._of(name, self.lines.get(name, {})) for name in reached))
            reached = sorted({other for name in reached for other in _importers(name)} - visited)
            visited |= set(reached)

    def _of(self, module: str, lines: Iterable[int]) -> frozenset[str]:
        """The tests that ran any of these lines."""
        by_line = self.lines.get(module, {})
        return frozenset().union(*(by_line.get(line, frozenset()) for line in lines))


def _alternating(tests: list[str]) -> Iterator[str]:
    """The first test of each file, then the second of each, and so on."""
    files: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        files[test.partition("::")[0]].append(test)
    return (test for test in chain.from_iterable(zip_longest(*files.values())) if test)


@dataclass(frozen=True)
class Statement:
    """A statement, of a compound statement only its head. first, last: its lines. inside: whether in a function.

    names: those that it binds; of a statement in a function, the function's name.
    """

    first: int
    last: int
    names: frozenset[str]
    inside: bool


@lru_cache
def _statements(module: str) -> dict[int, Statement]:
    """Line -> its innermost statement."""
    spans: dict[int, Statement] = {}
    _add_statements(_tree(module).body, "", spans)
    return spans


def _add_statements(body: Sequence[ast.AST], function: str, spans: dict[int, Statement]) -> None:
    """Add the statements in `body` to `spans`, outer statements first. function: the name of the one around them."""
    for node in body:
        around = function
        if isinstance(node, ast.stmt):
            inner = getattr(node, "body", None)
            last = max(inner[0].lineno - 1 if inner else node.end_lineno or node.lineno, node.lineno)
            names = frozenset([function] if function else _bound(node))
            statement = Statement(node.lineno, last, names, inside=bool(function))
            spans |= dict.fromkeys(range(node.lineno, last + 1), statement)
            if isinstance(node, ast.FunctionDef):
                around = node.name
        _add_statements(list(ast.iter_child_nodes(node)), around, spans)


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement outside functions binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


@lru_cache
def _uses() -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Name -> the statements in functions of the package that read it: module and lines."""
    uses: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for module in _modules():
        statements = _statements(module)
        for node in ast.walk(_tree(module)):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            statement = statements.get(getattr(node, "lineno", 0))
            if name and statement and statement.inside:
                uses[name].append((module, tuple(range(statement.first, statement.last + 1))))
    return uses


def _importers(module: str) -> frozenset[str]:
    """The modules whose text has the module's dotted name."""
    return _users().get(".".join(("exporter", *_dotted(module))), frozenset()) - {module}


@lru_cache
def _users() -> dict[str, frozenset[str]]:
    """Dotted name of a module or package -> the modules whose text has it, alone or as the start of a longer name."""
    users: dict[str, set[str]] = defaultdict(set)
    for module in _modules():
        for name in set(re.findall(r"\bexporter(?:\.\w+)+", _text(module))):
            for longer in accumulate(name.split("."), "{}.{}".format):
                users[longer].add(module)
    return {name: frozenset(modules) for name, modules in users.items()}


def _dotted(module: str) -> list[str]:
    return module.removesuffix("/__init__").split("/")


@lru_cache
def _modules() -> list[str]:
    package = ROOT / "exporter"
    return sorted(path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py"))


@lru_cache
def _text(module: str) -> str:
    return (ROOT / "exporter" / f"{module}.py").read_text(encoding="utf-8")


@lru_cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_text(module))
