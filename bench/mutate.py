"""Sampled mutation tests of every room of the package: the share of mutants that the tests detect.

    python -m bench.mutate [--room methods] [--sample 25] [--seed 0] [--jobs 2] [--minutes 60]

A mutant is one change of `mutation_operators` in one module; a room's mutants are sampled by seed. For each mutant, the
tests that ran its line (`line_tests`) run in a child of a fork server that has already imported the libraries; an
import hook loads the changed module, also in Python processes that a test starts. This needs no copy of the tree and
no import of torch per mutant. mutmut forks while torch's threads run, and cosmic-ray starts a new interpreter per
mutant. A test that detects a mutant must pass without it. `bench/mutations.py` has handwritten mutations.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.changed_module import PACKAGE, ROOT, load_changed
from bench.line_tests import LineTests
from bench.mutation_operators import Site, sites

BESIDE = "beside"  # the room of the modules beside the packages
PRELOAD = ["torch", "numpy", "pytest", "hypothesis", "transformers", "safetensors.torch", "PIL.Image", "pydantic"]
PIECES = re.compile(
    r"^(\w*PIECE|READ_BYTES|SMALL_BYTES|SHARD_BYTES|AT_ONCE|READERS|ROWS|\w*_WIDTH|WARPS|HELD|PANEL|TALL) = "
)
BOUNDS = {  # pattern of a line whose numbers no test can detect: why
    re.compile(r"\b(max|clamp_min)\(.*1e-\d\d\)"): "a divisor that avoids a division by zero, smaller than all values",
    PIECES: "the size of a piece of work, chosen for memory and time, does not change the result",
    re.compile(r"= Rates\(|^(SEARCH_FACTOR|ANSWER_SHARE|CHECKED_SHARE|IMPORTS|BLOCK|PICTURE) = "): (
        "factors of predicted durations, fitted to measurements of some devices"
    ),
    re.compile(r"^VERSION = "): "another number only makes other fingerprints",
    re.compile(r"\bindent=\d"): "spaces in a JSON file are for its readers",
    re.compile(r"\bcompress_level="): "the level of a lossless compression does not change the pictures",
    re.compile(r"\b(fontsize|linewidth|alpha|figsize|markersize|labelsize)="): "the look of a plot, not its data",
    re.compile(r"^(THREADS|HASHING) = 4|\bThreadPoolExecutor\(\d"): "the number of threads does not change the result",
    re.compile(r"^\w*SECONDS = |\btimeout="): "time limits and intervals only need to be long enough on a busy machine",
    re.compile(r"\bField\(.*\b(le|lt|max_length)="): "limits on options and files are far beyond all sensible values",
}
BEYOND = "a limit of a model's config that is far beyond all models"
EQUIVALENT = {  # (part of the line, change): why no test can detect it
    ("-bits < pair[2] < 8", "8 becomes 16"): "a byte shifted left by 8 is 0",
    ("_DRAWN_AT_ONCE = 2**21", "2 becomes 3"): "the number of indices per draw does not change them",
    ("_DRAWN_AT_ONCE = 2**21", "21 becomes 42"): "the number of indices per draw does not change them",
    ("correct or (0,) * ORDERS", "0 becomes 1"): "an empty set has a penalty of 0",
    ("if ratio < 1 else 1.0", "Lt becomes LtE"): "exp(1 - 1 / 1) is 1",
    ("np.random.default_rng(0).integers(0, 256, (240,", "0 becomes 1"): "any noise serves as the probe",
    (
        "_explained(_cut(image, aligned, COMPARED), shown) > limit",
        "Gt becomes GtE",
    ): "no picture explains exactly the limit",
    ("{gate.chance or 0:.4f}", "0 becomes 1"): "the chance is known where this text is written; `or` is for the types",
    ("{gate.samples or 0:,}", "0 becomes 1"): "the number is known where this text is written; `or` is for the types",
    ("if number > 2 * MOST_VALUES:", "Gt becomes GtE"): "it bounds memory; the exact limit follows in `_check`",
    ("weights[len(gram) - 1]", "1 becomes 2"): "the orders of n-grams are summed, so another order comes first",
    ("+ value * 0.0", "Add becomes Sub"): "zeros of either sign give the divisor its shape",
    ("+ weight * 0.0", "Add becomes Sub"): "zeros of either sign give the divisor its shape",
    ("concurrent: int = 16", "16 becomes 32"): "the number of open requests does not change the answers",
    ("_row_errors(weight, hessian, *full, scheme)", "Lt becomes LtE"): "of ranges with the same error either is right",
    ("(column > n) & (column < columns), other=0.0)", "Gt becomes GtE"): "a column that is rounded is not read again",
    ("(column > n) & (column < columns), other=0.0)", "Lt becomes LtE"): "a column beyond the last is not stored",
    ("most=2**", "2 becomes 3"): BEYOND,
    ("most=2**10", "10 becomes 20"): BEYOND,
    ("most=2**12", "12 becomes 24"): BEYOND,
    ("most=2**14", "14 becomes 28"): BEYOND,
    ("most=2**20", "20 becomes 40"): BEYOND,
    ("most=64", "64 becomes 128"): BEYOND,
    ("if needed <= MOST_SAMPLES else None", "LtE becomes Lt"): "no estimate is exactly ten million samples",
    ("secrets.token_hex(8)", "8 becomes 16"): "any length makes names of jobs that differ",
    ("max(1, PIECE // ", "FloorDiv becomes Mult"): "the size of a piece of work does not change the result",
    ("WIDEST = 1000", "1000 becomes 2000"): "no table is that wide",
    (".grid(alpha=", "the call is dropped"): "the look of a plot, not its data",
    ("scales = 2.0 ** torch.randint(-1, 2,", "1 becomes 2"): "any powers of two serve as the probe",
    ("scales = 2.0 ** torch.randint(-1, 2,", "2 becomes 3"): "any powers of two serve as the probe",
    ("narrow, broad, operations = [0], [0], 0", "0 becomes 1"): "one element or operation of billions is not seen",
    ("return 0.0", "None is returned"): "methods that learn no rounding have no learning rate",
}
FACTORS = (1, 3)  # of the tests that run against a mutant: first few, then more of them if none of these detects it
TIMEOUT_FACTOR = 5.0  # timeout relative to the tests' time without a mutant; a timeout counts as detected


@dataclass(frozen=True)
class Mutant:
    """One mutant. module: path below `exporter`, without suffix. number: index in `mutation_operators.sites`."""

    room: str
    module: str
    number: int
    site: Site

    @property
    def path(self) -> Path:
        return PACKAGE / f"{self.module}.py"

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.site.line}: {self.site.description}"


class _First:
    """Pytest plugin that records the first failed test."""

    test = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = str(report.nodeid)


def _child(mutant: Mutant | None, tests: Sequence[str], answer: Path) -> None:
    """Run the tests with the mutant; write the exit code and the first failed test to `answer`."""
    import pytest
    import torch

    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    os.chdir(ROOT)
    os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": str(answer.parent / "hypothesis"), "PYTHONPATH": str(ROOT)}
    if mutant:
        load_changed(mutant.module, mutant.number)
    first = _First()
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(answer.parent / answer.stem)]
    code_ = pytest.main([*options, *tests], plugins=[first])
    answer.write_text(json.dumps([int(code_), first.test]))


def run(mutant: Mutant | None, tests: Sequence[str], folder: Path, name: str, seconds: float) -> tuple[int, str]:
    """pytest's exit code and the first failed test; exit code -1 after a timeout or a crash."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    answer = folder / f"{name}.json"
    child = context.Process(target=_child, args=(mutant, list(tests), answer))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        return -1, "timeout"
    if not answer.is_file():
        return -1, f"the process ended with exit code {child.exitcode}"
    code, test = json.loads(answer.read_text())
    return int(code), str(test)


def rooms() -> list[str]:
    """The packages inside `exporter`, and `BESIDE`."""
    return [*sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")), BESIDE]


def modules(room: str) -> list[str]:
    """The modules of a room: paths below `exporter`, without suffix."""
    files = PACKAGE.glob("*.py") if room == BESIDE else (PACKAGE / room).rglob("*.py")
    return sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in files)


def sampled(room: str, sample: int, seed: int) -> list[Mutant]:
    """A random sample of a room's mutants, without equivalent ones."""
    candidates = []
    for module in modules(room):
        source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        lines = source.splitlines()
        for number, site in enumerate(sites(source)):
            candidates += [] if _equivalent(lines[site.line - 1], site) else [Mutant(room, module, number, site)]
    return sorted(random.Random(f"{seed} {room}").sample(candidates, min(sample, len(candidates))), key=str)


def _equivalent(line: str, site: Site) -> bool:
    """Whether no test can detect the mutant, by `BOUNDS` or `EQUIVALENT`."""
    number = re.match(r"\d", site.description) is not None
    return (number and any(bound.search(line) for bound in BOUNDS)) or any(
        part in line and site.description == description for part, description in EQUIVALENT
    )


@dataclass
class Trial:
    """Runs mutants. tests: the tests of each line. sound: test -> whether it passes alone without a mutant."""

    tests: LineTests
    folder: Path
    end: float
    sound: dict[str, bool] = field(default_factory=dict)

    def detects(self, number: int, mutant: Mutant) -> tuple[Mutant, str] | None:
        """The mutant and the test that detects it (empty if none does); None after the time `end`."""
        if time.monotonic() > self.end:
            return None
        tried: list[str] = []
        for factor in FACTORS:
            selected = self.tests.select(mutant.module, mutant.site.line, factor)
            tests = [test for test in selected if test not in tried]
            tried += tests
            if test := self._first_to_detect(mutant, tests, f"{mutant.room}-{number}-{factor}"):
                return mutant, test
        return mutant, ""

    def _first_to_detect(self, mutant: Mutant, tests: list[str], name: str) -> str:
        """The test that detects the mutant; empty if none does."""
        limit = TIMEOUT_FACTOR * sum(self.tests.seconds[test] for test in tests) + 30
        while tests:
            code, test = run(mutant, tests, self.folder, name, limit)
            if code in (0, 5):  # all tests pass, or all were skipped
                return ""
            if test not in tests or self._passes(test):
                return test or f"exit code {code}"
            tests = [other for other in tests if other != test]
        return ""

    def _passes(self, test: str) -> bool:
        if test not in self.sound:
            self.sound[test] = run(None, [test], self.folder, f"none-{len(self.sound)}", 300)[0] == 0
        return self.sound[test]


def run_all(mutants: Sequence[Mutant], jobs: int, trial: Trial) -> Iterator[tuple[Mutant, str]]:
    """(mutant, the test that detects it or an empty string), until the trial's end."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from filter(None, pool.map(trial.detects, range(len(mutants)), mutants))


def require_sound(tests: LineTests, folder: Path) -> None:
    """SystemExit unless a test passes in a child process without a mutant; else each mutant would count as detected."""
    fastest = min(tests.seconds, key=lambda test: (tests.seconds[test], test))
    code, reason = run(None, [fastest], folder, "sound", 300)
    if code != 0:
        sys.exit(f"{fastest} does not pass without a mutant: {reason or f'exit code {code}'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 1 if a room's tests detect less than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", action="append", choices=rooms(), help="may be repeated [all]")
    parser.add_argument("--sample", type=int, default=25, help="mutants of each room [25]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no mutant after this time [60]")
    parser.add_argument("--goal", type=float, default=0.95, help="share of all mutants that must be detected [0.95]")
    options = parser.parse_args(arguments)
    mutants = [mutant for room in options.room or rooms() for mutant in sampled(room, options.sample, options.seed)]
    random.Random(options.seed).shuffle(mutants)  # a run that ends early has tried mutants of every room
    results: dict[str, list[tuple[Mutant, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tests = LineTests.read()
        require_sound(tests, Path(folder))
        trial = Trial(tests, Path(folder), time.monotonic() + 60 * options.minutes)
        for number, (mutant, test) in enumerate(run_all(mutants, options.jobs, trial), 1):
            results.setdefault(mutant.room, []).append((mutant, test))
            print(f"{number:3} {mutant}: {test or 'NOT DETECTED'}", file=sys.stderr, flush=True)
    total = missed = 0
    for room, tried in sorted(results.items()):
        survivors = [mutant for mutant, test in tried if not test]
        total, missed = total + len(tried), missed + len(survivors)
        print(f"{room}: {len(tried) - len(survivors)} of {len(tried)} detected", flush=True)
        for mutant in survivors:
            print(f"  not detected: {mutant}", flush=True)
    share = 1 - missed / max(1, total)
    print(f"all rooms: {total - missed} of {total} detected ({share:.1%})", flush=True)
    sys.exit(0 if total and share >= options.goal else 1)


if __name__ == "__main__":
    main()
