"""Sampled mutation tests of the numeric rooms: the share of mutants that a room's tests detect.

    python -m bench.mutate [--room methods] [--sample 40] [--seed 0] [--jobs 2] [--minutes 30]

A mutant is one change of `mutation_operators` in one module; a room's mutants are sampled by seed. For each mutant, the
tests of its module run in a child of a fork server that has already imported the libraries; an import hook loads the
changed module. This needs no copy of the tree and no import of torch per mutant. mutmut forks while torch's threads
run, and cosmic-ray starts a new interpreter per mutant. `bench/mutations.py` has handwritten mutations.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bench.mutation_operators import Site, mutated, sites

HERE = Path(__file__).resolve().parent.parent
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {  # room -> module -> its tests (files, or FILE::TEST), fastest first
    "methods": {
        "methods/rtn": ("test_methods", "test_gptq"),
        "methods/awq": ("test_awq", "test_methods", "test_smooth"),
        "methods/gptq": ("test_gptq", "test_methods"),
        "numerics/gptq_columns": ("test_gptq", "test_kernels"),
        "numerics/inverse_cholesky": ("test_factor", "test_gptq"),
        "numerics/hessian": ("test_gptq", "test_awq", "test_factor", "test_methods", "test_source_error"),
        "numerics/ranges": ("test_ranges", "test_methods", "test_gptq", "test_awq", "test_float8"),
        "numerics/scale_folding": ("test_folds", "test_exact_folds"),
    },
    "formats": {
        "numerics/quantized": ("test_quantized", "test_formats", "test_float8"),
        "formats/__init__": ("test_formats",),
        "formats/autoawq": ("test_formats",),
        "formats/autogptq": ("test_formats",),
        "formats/compressed_tensors": ("test_formats", "test_float8"),
    },
    "tasks": {
        "tasks/bleu": ("test_metrics", "test_tasks"),
        "tasks/captioning": ("test_metrics", "test_tasks"),
        "tasks/cider": ("test_tasks", "test_metrics"),
        "tasks/ptb": ("test_metrics", "test_tasks"),
        "tasks/retrieval": (
            "test_metrics",
            *(
                f"test_retrieval::test_{name}"
                for name in (
                    "ranks_with_ties_are_those_of_recalls",
                    "scores_are_shares_of_what_was_found",
                    "an_answer_in_another_format_counts_as_no_match",
                    "recalls_of_the_whole_set_count_texts",
                    "pools_know_what_is_searched",
                    "flickr30k_is_searched_with_the_papers_candidates",
                )
            ),
        ),
        "tasks/vqa": ("test_metrics", "test_tasks"),
        "evaluation/statistics": ("test_statistics", "test_evaluate::test_a_gate_decides_by_the_relative_loss"),
        "evaluation/sample_size": (
            "test_statistics",
            "test_evaluate::test_a_plan_reports_the_number_of_samples_that_a_gate_needs",
            "test_evaluate::test_retrieval_has_advice_and_captioning_has_a_reason_for_none",
        ),
    },
    "data": {
        "data/coco": ("test_datasets", "test_data"),
        "data/flickr30k": ("test_datasets", "test_data"),
        "data/folder": ("test_data", "test_datasets"),
        "data/gqa": ("test_datasets", "test_data"),
        "data/overlap": ("test_data", "test_datasets"),
        "data/rows": ("test_data", "test_datasets"),
        "data/vqav2": ("test_datasets", "test_data"),
    },
    "families": {
        "model/families/family": ("test_families", "test_parts", "test_headers", "test_serve_lint"),
        "model/families/llava": ("test_families", "test_headers", "test_parts", "test_plan"),
        "model/families/blip2": ("test_families", "test_headers", "test_parts", "test_plan", "test_blip2"),
        "model/families/parts/text": ("test_parts", "test_families", "test_headers"),
        "model/families/parts/vision": ("test_parts", "test_families", "test_headers"),
    },
}
PRELOAD = ["torch", "numpy", "pytest", "hypothesis", "transformers", "safetensors.torch", "PIL.Image", "pydantic"]
EQUIVALENT = {  # (part of the line, change): why no test can detect it
    ("-bits < pair[2] < 8", "8 becomes 9"): "a byte shifted left by 8 is 0",
    ("_DRAWN_AT_ONCE = 2**21", "2 becomes 3"): "the number of indices per draw does not change them",
    ("_DRAWN_AT_ONCE = 2**21", "21 becomes 22"): "the number of indices per draw does not change them",
    ("correct or (0,) * ORDERS", "0 becomes 1"): "an empty set has a penalty of 0",
    ("if ratio < 1 else 1.0", "Lt becomes LtE"): "exp(1 - 1 / 1) is 1",
}
GENEROUS = 5.0  # timeout relative to the tests' time without a mutant; a timeout counts as detected


@dataclass(frozen=True)
class Mutant:
    """One mutant. module: path below `exporter`, without suffix. number: index in `mutation_operators.sites`."""

    room: str
    module: str
    number: int
    site: Site

    @property
    def path(self) -> Path:
        return HERE / "exporter" / f"{self.module}.py"

    def __str__(self) -> str:
        return f"{self.path.relative_to(HERE)}:{self.site.line}: {self.site.what}"


class _Changed(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Import hook that loads one module from its changed code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        package = self.path.name == "__init__.py"
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=[str(self.path.parent)] if package else None
        )

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


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
    os.chdir(HERE)
    os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": str(answer.parent / "hypothesis"), "PYTHONPATH": str(HERE)}
    if mutant:
        name = "exporter." + mutant.module.removesuffix("/__init__").replace("/", ".")
        code = compile(mutated(mutant.path.read_text(encoding="utf-8"), mutant.number), str(mutant.path), "exec")
        sys.meta_path.insert(0, _Changed(name, mutant.path, code))
    first = _First()
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(answer.parent / answer.stem)]
    code_ = pytest.main([*options, *tests], plugins=[first])
    answer.write_text(json.dumps([int(code_), first.test]))


def run(mutant: Mutant | None, tests: Sequence[str], folder: Path, name: str, seconds: float) -> tuple[int, str]:
    """pytest's exit code and the first failed test; exit code -1 after a timeout or a crash."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    answer = folder / f"{name}.json"
    child = context.Process(target=_child, args=(mutant, [_path(test) for test in tests], answer))
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


def _path(test: str) -> str:
    """pytest's argument for `FILE` or `FILE::TEST`."""
    file, _, name = test.partition("::")
    return f"tests/{file}.py" + (f"::{name}" if name else "")


def sampled(room: str, sample: int, seed: int) -> list[Mutant]:
    """A random sample of a room's mutants, without equivalent ones."""
    every = []
    for module in ROOMS[room]:
        source = (HERE / "exporter" / f"{module}.py").read_text(encoding="utf-8")
        lines = source.splitlines()
        for number, site in enumerate(sites(source)):
            same = any(part in lines[site.line - 1] and site.what == what for part, what in EQUIVALENT)
            every += [] if same else [Mutant(room, module, number, site)]
    return sorted(random.Random(f"{seed} {room}").sample(every, min(sample, len(every))), key=str)


def run_all(mutants: Sequence[Mutant], jobs: int, end: float, folder: Path) -> Iterator[tuple[Mutant, bool, str]]:
    """(mutant, whether a test detected it, that test), until the time `end`."""
    room = ROOMS[mutants[0].room] if mutants else {}
    limits: dict[str, float] = {}

    def without(module: str) -> None:
        """Set the timeout of a module's mutants from the time of its tests without a mutant."""
        begun = time.monotonic()
        code, test = run(None, room[module], folder, f"none-{module.replace('/', '-')}", 600)
        if code:
            raise SystemExit(f"{module}: its tests fail without a mutant: {test} (exit code {code})")
        limits[module] = GENEROUS * (time.monotonic() - begun) + 10

    def with_mutant(numbered: tuple[int, Mutant]) -> tuple[Mutant, bool, str] | None:
        number, mutant = numbered
        if time.monotonic() > end:
            return None
        code, test = run(mutant, room[mutant.module], folder, f"{mutant.room}-{number}", limits[mutant.module])
        return mutant, code != 0, test or f"exit code {code}"

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(without, dict.fromkeys(mutant.module for mutant in mutants)))
        yield from filter(None, pool.map(with_mutant, enumerate(mutants)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 1 if a room's tests detect less than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", action="append", choices=ROOMS, help="may be repeated [all]")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each room [40]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=30.0, help="start no mutant after this time [30]")
    parser.add_argument("--goal", type=float, default=0.95, help="share of the mutants that must be detected [0.95]")
    options = parser.parse_args(arguments)
    end, low = time.monotonic() + 60 * options.minutes, False
    for room in options.room or ROOMS:
        with tempfile.TemporaryDirectory() as folder:
            results = []
            for result in run_all(sampled(room, options.sample, options.seed), options.jobs, end, Path(folder)):
                results.append(result)
                mutant, detected, test = result
                print(
                    f"{room} {len(results):3} {mutant}: {test if detected else 'NOT DETECTED'}",
                    file=sys.stderr,
                    flush=True,
                )
        survivors = [mutant for mutant, detected, _ in results if not detected]
        share = 1 - len(survivors) / len(results) if results else 0.0
        low = low or share < options.goal
        print(f"{room}: {len(results) - len(survivors)} of {len(results)} detected ({share:.0%})", flush=True)
        for mutant in survivors:
            print(f"  not detected: {mutant}", flush=True)
    sys.exit(1 if low else 0)


if __name__ == "__main__":
    main()
