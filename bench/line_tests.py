"""Which tests run a line: a pytest plugin that records it, and the selection of tests for a mutated line.

    python -m pytest -p bench.line_tests -n 2 --dist loadfile

Every worker writes `build/line_tests/WORKER.json`: the seconds of each passed test, and for each module of `exporter`
its lines with the tests (by their number) that ran them. Processes that a test starts are not recorded.
"""

import ast
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "line_tests"
MAX_TESTS = 150  # tests that run against one mutant
MAX_SECONDS = 40.0  # their total time without a mutant


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

    def select(self, module: str, line: int) -> list[str]:
        """Tests that run the statement at `line`, the fastest of each file first; of the whole module if it has none.

        A statement of a module's top level runs at import, which no test owns.
        """
        by_line = self.lines.get(module, {})
        first, last = _statements(module).get(line, (line, line))
        tests = frozenset().union(*(by_line.get(number, frozenset()) for number in range(first, last + 1)))
        tests = tests or frozenset().union(*by_line.values())
        selected: list[str] = []
        total = 0.0
        for test in _alternating(sorted(tests, key=lambda test: (self.seconds[test], test))):
            total += self.seconds[test]
            if selected and (len(selected) == MAX_TESTS or total > MAX_SECONDS):
                break
            selected.append(test)
        return selected


def _alternating(tests: list[str]) -> Iterator[str]:
    """The first test of each file, then the second of each, and so on."""
    files: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        files[test.partition("::")[0]].append(test)
    return (test for test in chain.from_iterable(zip_longest(*files.values())) if test)


@lru_cache
def _statements(module: str) -> dict[int, tuple[int, int]]:
    """Line -> first and last line of its innermost statement; of a compound statement, only those of its head."""
    tree = ast.parse((ROOT / "exporter" / f"{module}.py").read_text(encoding="utf-8"))
    spans: dict[int, tuple[int, int]] = {}
    for node in ast.walk(tree):  # outer statements first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            spans |= dict.fromkeys(range(node.lineno, max(last, node.lineno) + 1), (node.lineno, last))
    return spans
