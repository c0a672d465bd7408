"""Damaged model folders, adapters, data and pictures, by seed: each must end in one MmqError, or work.

    python -m bench.attack --count 3000 --jobs 1
    python -m bench.attack --only config:17          # one mutation again, with its traceback
    python -m bench.attack --table LOG [LOG ...]     # the table of finished runs, from the files of --log

Workers try mutations one after the other; one that dies or does not answer in time is replaced. Outcomes: `refused`
by an MmqError of one message; `works`: the plan was made, the model was read whole and it answered; `late`: an MmqError
after the plan was made; `traceback`: any other exception; `hang`; `died`: the worker's process ended.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

OUTCOMES = ("refused", "works", "late", "traceback", "hang", "died")
SECONDS = 120  # of wall time for one mutation; the process that loads processors has its own limits
MOST_CHARACTERS = 3000  # of a message


class Case(NamedTuple):
    """One mutation."""

    kind: str
    number: int
    seed: int


class Result(NamedTuple):
    """Outcome of one mutation. detail: the error's message or the traceback."""

    case: Case
    outcome: str
    detail: str = ""


def attempt(case: Case, folder: Path) -> Result:
    """Write the damaged input below `folder` and run mmq on it."""
    from bench.attack_kinds import KINDS
    from exporter.errors import MmqError

    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "input"
    source.mkdir(parents=True)
    kind = KINDS[case.kind]
    kind.damage(source, Random(f"{case.seed}:{case.kind}:{case.number}"))
    accepted: list[bool] = []
    try:
        kind.attempt(source, lambda: accepted.append(True))
    except MmqError as error:
        message = f"{error.message}\n{error.hint or ''}"
        message.encode()
        if len(message) > MOST_CHARACTERS or not error.message.strip():
            return Result(case, "traceback", f"a message of {len(message)} characters: {message[:200]}")
        return Result(case, "late" if accepted else "refused", error.message)
    except Exception:  # noqa: BLE001 (the attack looks for these)
        return Result(case, "traceback", traceback.format_exc())
    return Result(case, "works")


def work(pipe: Connection, folder: Path) -> None:
    """Main loop of a worker: receive cases from the pipe and send their results."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    os.environ["MMQ_CACHE"] = str(folder.with_name(f"{folder.name}-cache"))
    import torch

    torch.set_num_threads(1)
    while True:
        case = pipe.recv()
        if case is None:
            return
        pipe.send(attempt(case, folder))


class Worker:
    """A process that runs cases; it is restarted after a crash or a timeout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=work, args=(child_pipe, self._folder), daemon=True)
        self._process.start()
        child_pipe.close()
        self.case: Case | None = None
        self.started = 0.0

    def submit(self, case: Case) -> None:
        """Start a case; a process that ended after its last result is replaced first."""
        try:
            self.pipe.send(case)
        except OSError:
            self.close()
            self._start()
            with suppress(OSError):  # `result` reports that the new process ended too
                self.pipe.send(case)
        self.case, self.started = case, time.monotonic()

    def result(self) -> Result | None:
        """The result of the current case; None while it runs."""
        assert self.case is not None
        case = self.case
        try:
            if self.pipe.poll():
                self.case = None
                result: Result = self.pipe.recv()
                return result
        except (EOFError, OSError):
            self._process.join()
            ended = Result(case, "died", f"exit code {self._process.exitcode}")
            self._start()
            return ended
        if time.monotonic() - self.started < SECONDS:
            return None
        self.close()
        self._start()
        return Result(case, "hang", f"no answer within {SECONDS} s")

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()


def cases(count: int, seed: int, only: str | None) -> list[Case]:
    """`count` mutations, distributed over the kinds by `Kind.share`; only: `KIND` or `KIND:NUMBER`."""
    from bench.attack_kinds import KINDS

    name, _, number = (only or "").partition(":")
    if number:
        return [Case(name, int(number), seed)]
    shares = {kind: KINDS[kind].share for kind in ([name] if name else KINDS)}
    total = sum(shares.values())
    return [Case(kind, i, seed) for kind, share in shares.items() for i in range(round(count * share / total))]


def attack(waiting: list[Case], jobs: int) -> Iterator[Result]:
    """Run all cases on `jobs` workers; yield results as they complete."""
    with tempfile.TemporaryDirectory(prefix="mmq-attack-") as folder:
        workers = [Worker(Path(folder) / f"{i}") for i in range(jobs)]
        waiting = list(reversed(waiting))
        try:
            while waiting or any(worker.case for worker in workers):
                for worker in workers:
                    if worker.case is None and waiting:
                        worker.submit(waiting.pop())
                busy = [worker for worker in workers if worker.case]
                wait([worker.pipe for worker in busy], timeout=1)
                yield from filter(None, [worker.result() for worker in busy])
        finally:
            for worker in workers:
                worker.close()


def table(results: list[Result]) -> str:
    """Counts by kind and outcome, as a Markdown table."""
    from bench.attack_kinds import KINDS

    counts = Counter((result.case.kind, result.outcome) for result in results)
    rows = [f"| kind | damaged | mutations | {' | '.join(OUTCOMES)} |", "|---|---|---|" + "---|" * len(OUTCOMES)]
    for kind in [*dict.fromkeys(result.case.kind for result in results), "all"]:
        row = {o: sum(n for (k, out), n in counts.items() if out == o and kind in (k, "all")) for o in OUTCOMES}
        about = KINDS[kind].about if kind in KINDS else ""
        rows.append(f"| {kind} | {about} | {sum(row.values())} | {' | '.join(str(row[o]) for o in OUTCOMES)} |")
    return "\n".join(rows)


def from_log(path: Path) -> list[Result]:
    """The results that `--log` wrote."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [Result(Case(e["kind"], e["number"], e["seed"]), e["outcome"], e["detail"]) for e in entries]


def main() -> None:
    """Run the attack, print failures and the table; exit code 1 after any traceback, hang or crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", metavar="KIND[:NUMBER]")
    parser.add_argument("--log", type=Path, help="every result as a line of JSON")
    parser.add_argument("--table", type=Path, nargs="+", metavar="LOG", help="only print the table of these logs")
    options = parser.parse_args()
    if options.table:
        return print(table([result for path in options.table for result in from_log(path)]))
    start, results = time.monotonic(), []
    log = options.log.open("w") if options.log else None
    for result in attack(cases(options.count, options.seed, options.only), options.jobs):
        results.append(result)
        if log:
            log.write(json.dumps(as_json(result)) + "\n")
        if result.outcome not in ("refused", "works") or options.only:
            print(f"{result.case.kind}:{result.case.number} {result.outcome}\n{result.detail}", flush=True)
    print(table(results))
    print(f"seed {options.seed}, {time.monotonic() - start:.0f} s, {options.jobs} workers")
    raise SystemExit(any(result.outcome in ("traceback", "hang", "died") for result in results))


def as_json(result: Result) -> dict[str, Any]:
    """A result as plain data."""
    return {**result.case._asdict(), "outcome": result.outcome, "detail": result.detail}


if __name__ == "__main__":
    main()
